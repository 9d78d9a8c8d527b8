"""A forward pass inside steer() is the formula of method section 4, float64."""

import pytest
import torch
from pairs import VOCAB, gpt2, join, neox, sparse_model, tokens, with_units
from steered import CHANNEL, DENSE, EDITS, LEFT, SITE, SPARSE, gpt2_without_eos, logits, slow_but, steered, written_out

from bridges.steering.counterfactual import counterfactual
from bridges.steering.delta import stream_to_read
from bridges.steering.edits import Edit
from bridges.steering.steer import steer


@pytest.mark.parametrize("source", ["sparse", "encoder"])
@pytest.mark.parametrize("at", ["read", "residual"])
@pytest.mark.parametrize("edits", slow_but(EDITS, "in order", "several"))
@pytest.mark.parametrize("dense", DENSE)
@pytest.mark.parametrize("sparse", SPARSE)
def test_a_forward_pass_is_the_written_out_formula(dense, sparse, edits, at, source):
    pair, ids = with_units(join(DENSE[dense](), SPARSE[sparse]())), tokens()
    expected = written_out(pair, edits, ids, LEFT, 0.8, at, source)
    with steered(pair, edits, strength=0.8, at=at, source=source):
        found = logits(pair, ids, LEFT)
    real = LEFT.bool()
    assert (found - expected)[real].abs().max() <= 1e-10 * expected[real].abs().max()
    assert (found - logits(pair, ids, LEFT))[real].abs().max() > 1e-4


@pytest.mark.parametrize("at", ["read", "residual"])
def test_a_counterfactual_moves_the_channel_to_its_reading_on_the_other_prompt(pair, at):
    ids = tokens()
    other = ids.clone()
    other[:, 3] = (other[:, 3] + 1) % VOCAB
    edit = counterfactual(pair.sparse.model, SITE, CHANNEL, ids, other)
    with torch.no_grad():
        reads = [pair.sparse.reads(x)[pair.sparse.index(SITE)][..., CHANNEL] for x in (ids, other)]
    assert torch.equal(edit.value, reads[1] - reads[0]) and edit.value[:, 3:].any()
    bridge, site = pair.bridge_set[SITE], pair.dense.index(SITE)
    with torch.no_grad():
        dz = edit.value * bridge.rms_sparse / bridge.gain_sparse[CHANNEL]
        delta = dz[..., None] * bridge.decoder_weight[:, CHANNEL]
        trace = pair.dense.trace(ids)
        if at == "residual":
            expected = pair.dense.tail(site, trace.residuals[site] + delta, trace.context)
        else:
            delta = stream_to_read(pair.dense.norm(site), bridge.rms_dense, delta)
            with pair.dense.hook_reads({site: lambda read: read + delta}):
                expected = pair.dense.tail(site, trace.residuals[site], trace.context)
    with steered(pair, edit, at=at, sparse=None):
        found = logits(pair, ids)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert torch.equal(found[:, :3], logits(pair, ids)[:, :3])  # before the cue, not a bit


@pytest.mark.parametrize("at", ["read", "residual"])
def test_a_read_edit_of_a_block_enters_every_module_that_reads_its_stream(at):
    pair, ids = with_units(join(neox(), sparse_model())), tokens()
    bridge, channel = pair.bridge_set[0], 3
    layer = pair.dense.model.gpt_neox.layers[0]
    with torch.no_grad():
        delta = bridge.decoder_weight[:, channel] * bridge.rms_sparse / bridge.gain_sparse[channel] * 0.6
        centred = (delta - delta.mean()) / bridge.rms_dense
        modules = {layer.attention: layer.input_layernorm, layer.mlp: layer.post_attention_layernorm}

        def shift(addend):
            return lambda module, args, kwargs: ((args[0] + addend, *args[1:]), kwargs)

        if at == "read":
            hooks = [(module, shift(centred * norm.weight)) for module, norm in modules.items()]
        else:
            hooks = [(layer, shift(delta))]
        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
        expected = logits(pair, ids)
        for handle in handles:
            handle.remove()
    with steered(pair, Edit(pair.bridge_set.sites[0], channel, 0.6, "add"), at=at):
        found = logits(pair, ids)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert (found - logits(pair, ids)).abs().max() > 1e-3


@pytest.mark.parametrize("source", ["sparse", "encoder"])
@pytest.mark.parametrize("at", ["read", "residual"])
@pytest.mark.parametrize("dense", [gpt2_without_eos, sparse_model])
def test_an_edit_at_the_head_where_only_the_last_logits_are_kept(dense, at, source):
    pair, ids = with_units(join(dense(), sparse_model(seed=7))), tokens()
    with steered(pair, Edit("final", CHANNEL, 3.0), at=at, source=source):
        whole = logits(pair, ids)
        for kept in (1, 2):
            with torch.no_grad():
                last = pair.dense.model(ids, logits_to_keep=kept).logits
            assert last.shape == (4, kept, VOCAB)
            torch.testing.assert_close(last, whole[:, -kept:], rtol=0, atol=1e-12)
        picked = torch.tensor([0, 2])
        if at == "read":
            with pytest.raises(ValueError, match="logits_to_keep must be an integer when an edit changes the input"):
                pair.dense.model(ids, logits_to_keep=picked)
        else:
            with torch.no_grad():
                some = pair.dense.model(ids, logits_to_keep=picked).logits
            torch.testing.assert_close(some, whole[:, picked], rtol=0, atol=1e-12)
    assert (whole - logits(pair, ids)).abs().max() > 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    pair = with_units(join(gpt2(dtype=dtype), sparse_model(dtype=torch.float32)))
    wide = with_units(join(gpt2(dtype=dtype).float(), sparse_model(dtype=torch.float32)))
    edits = EDITS["several"][:2]
    for at in ("read", "residual"):
        with steered(pair, edits, at=at):
            found = logits(pair, tokens())
            assert found.dtype == dtype
            out = pair.dense.model.generate(tokens(), max_new_tokens=3, do_sample=False, pad_token_id=0)
            assert out.shape == (4, 10)
        with steered(wide, edits, at=at):
            expected = logits(wide, tokens())
        assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_model_may_be_its_own_sparse_model():
    model, ids = gpt2_without_eos(), tokens()
    pair = with_units(join(model, model))
    other = with_units(join(gpt2_without_eos(), gpt2_without_eos()))
    edits = [Edit("0.mlp", 3, 2.0, "scale"), Edit("1.attn", 1, 0.5)]
    with steer(model, pair.bridge_set, edits, sparse=model):
        found = logits(pair, ids)
        generated = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    with steered(other, edits):
        assert torch.allclose(found, logits(other, ids), atol=1e-12)
        assert torch.equal(
            generated, other.dense.model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        )


def test_gradients_pass_through_a_steered_model(pair):
    embeddings = pair.dense.model.get_input_embeddings().weight
    with steered(pair, EDITS["set"]):
        loss = pair.dense.model(tokens(), labels=tokens()).loss
    loss.backward()
    assert embeddings.grad.abs().max() > 0
    assert all(p.grad is None for p in pair.sparse.model.parameters())
