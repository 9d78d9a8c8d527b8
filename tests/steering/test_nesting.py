"""Several steer() contexts in one model, and models in several threads."""

import sys
import threading

import pytest
import torch
from pairs import gpt2, join, sparse_model, tokens, with_units
from steered import CHANNEL, EDITS, gpt2_without_eos, logits, slow_but, steered, written_out

from bridges.steering.edits import Edit


@pytest.mark.parametrize("at", ["read", "residual"])
@pytest.mark.parametrize("source", ["sparse", "encoder"])
def test_contexts_nest(pair, at, source):
    edits = EDITS["several"]
    expected = written_out(pair, edits, tokens(), None, 1.0, at, source)
    with steered(pair, edits[:2], at=at, source=source):
        outer = logits(pair, tokens())
        with steered(pair, edits[2:], at=at, source=source):
            inner = logits(pair, tokens())
        assert torch.equal(logits(pair, tokens()), outer)
    assert (inner - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("at", ["read", "residual"])
def test_the_encoder_reads_the_stream_without_the_edits_of_other_contexts(pair, at):
    outer, inner, ids = Edit("1.attn", 3, 3.0, "scale"), Edit("0.attn", 5, 4.0, "add"), tokens()
    options = dict(source="encoder", at=at, sparse=None)
    with steered(pair, [outer, inner], **options):
        expected = logits(pair, ids)
    with steered(pair, outer, **options), steered(pair, inner, **options):
        assert torch.allclose(logits(pair, ids), expected, atol=1e-12)
    with steered(pair, inner, **options), steered(pair, outer, **options):
        assert torch.allclose(logits(pair, ids), expected, atol=1e-12)
    with steered(pair, outer, **options):
        alone = logits(pair, ids)
        with steered(pair, inner, **options):
            pass
        assert torch.equal(logits(pair, ids), alone) and not torch.allclose(alone, expected)


@pytest.mark.parametrize("dense", [gpt2_without_eos, lambda: sparse_model(seed=6)], ids=["gpt2", "sparse model"])
@pytest.mark.parametrize("at", ["read", "residual"])
@pytest.mark.parametrize("site", ["0.mlp", "1.attn", "final"])
def test_contexts_may_be_left_in_any_order(dense, site, at):
    pair, ids = with_units(join(dense(), sparse_model())), tokens()
    plain, attributes = logits(pair, ids), [set(vars(module)) for module in pair.dense.model.modules()]
    first, second = (steered(pair, Edit(site, c, 4.0), at=at) for c in (CHANNEL, 5))
    with steered(pair, Edit(site, 5, 4.0), at=at):
        expected = logits(pair, ids)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(logits(pair, ids), expected)
    second.__exit__(None, None, None)
    assert torch.equal(logits(pair, ids), plain)
    assert [set(vars(module)) for module in pair.dense.model.modules()] == attributes


def test_a_refused_context_leaves_the_edits_of_the_outer_one_on(pair):
    ids = tokens()
    with steered(pair, EDITS["several"]):
        expected = logits(pair, ids)
        for refused in ({"edits": Edit("7.attn", 0, 1.0)}, {"edits": EDITS["set"], "sparse": None}):
            with pytest.raises(ValueError), steered(pair, **refused):
                pass
            assert torch.equal(logits(pair, ids), expected)
    assert not torch.allclose(logits(pair, ids), expected)


@pytest.mark.parametrize("source", ["sparse", "encoder"])
def test_a_users_hook_may_call_the_steered_model_inside_a_call(pair, source):
    ids, inner, inside = tokens(), [], []
    with steered(pair, EDITS["several"], source=source):
        expected, expected_inner = logits(pair, ids), logits(pair, ids[:, :4])

        def call(*_):
            if not inside:
                inside.append(None)
                inner.append(logits(pair, ids[:, :4]))
                inside.clear()

        handle = pair.dense.model.transformer.h[0].register_forward_pre_hook(call)
        assert torch.equal(logits(pair, ids), expected)
        handle.remove()
    assert torch.equal(inner[-1], expected_inner)  # the first one's may be of the run that reads, without edits


def test_two_threads_may_steer_two_models():
    pairs = [with_units(join(gpt2_without_eos(), sparse_model())) for _ in range(2)]
    edits = [EDITS["set"], EDITS["several"]]
    found, barrier = [None, None], threading.Barrier(2)

    def run(i):
        with steered(pairs[i], edits[i]):
            barrier.wait()
            for _ in range(5):
                found[i] = logits(pairs[i], tokens())
            barrier.wait()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        with steered(pairs[i], edits[i]):
            assert torch.equal(found[i], logits(pairs[i], tokens()))


@pytest.mark.parametrize("sparse", slow_but({"sparse": sparse_model, "gpt2": lambda: gpt2(width=12, seed=2)}, "gpt2"))
def test_threads_may_share_a_sparse_model(sparse):
    """Two dense models, different prompts, one sparse model that is decomposed, hooked and read in both."""
    sparse, before = sparse(), sys.getswitchinterval()
    pairs = [with_units(join(gpt2_without_eos(), sparse)) for _ in range(2)]
    prompts, expected, right = [tokens(seed=seed) for seed in (1, 2)], [], []
    for pair, ids in zip(pairs, prompts, strict=True):
        with steered(pair, EDITS["several"]):
            expected.append(logits(pair, ids))

    def loop(i):
        for _ in range(4):
            with steered(pairs[i], EDITS["several"]):
                right.extend(i for _ in range(4) if torch.equal(logits(pairs[i], prompts[i]), expected[i]))

    threads = [threading.Thread(target=loop, args=(i,)) for i in range(2)]
    try:
        sys.setswitchinterval(1e-6)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert sorted(right) == [0] * 16 + [1] * 16
