"""Logits of some tokens, and reads at some sites: the same as of the whole pass, with less computed."""

import pytest
import torch
from pairs import MASK, neox, sparse_model, tokens

from bridges.models.loading import as_residual

FAMILIES = ["gpt2", "llama", "gemma2", "mpt", "bloom", "lfm2"]
SITES = {"all": None, "some": [1, "final"], "one": [2], "none": []}


@pytest.fixture(params=[*FAMILIES, "sparse", "sparse with a bigram table"])
def model(request, tiny):
    if request.param == "sparse":
        return as_residual(sparse_model(enable_bigram_table=False, learnable_bigram_table=False))
    if request.param.startswith("sparse"):
        return as_residual(sparse_model())
    return as_residual(tiny(request.param).double())


@pytest.mark.parametrize("kept", [[-1 % 7], [0, 3, 6], list(range(7))])
def test_logits_of_some_tokens_are_rows_of_all_logits(model, kept):
    with torch.no_grad():
        trace = model.trace(tokens(), MASK)
        some = model.logits_at(trace.residuals[-1], trace.context, torch.tensor(kept))
    assert some[0].isfinite().all()  # eager attention gives NaN in float64 where a row begins with padding
    torch.testing.assert_close(some, trace.logits[:, kept], rtol=1e-12, atol=1e-12, equal_nan=True)


def test_the_unembedding_computes_the_kept_tokens_alone(tiny):
    model = as_residual(tiny("gpt2"))
    seen = []
    handle = model.model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    with torch.no_grad():
        trace = model.trace(tokens())
        seen.clear()
        model.logits_at(trace.residuals[-1], trace.context, torch.tensor([6]))
        assert seen == [(4, 1, 32)]
    handle.remove()


@pytest.mark.parametrize("sites", SITES.values(), ids=SITES)
def test_reads_at_some_sites_are_those_of_the_whole_pass(model, sites):
    """Seen by hooks in the model's own pass."""
    wanted = range(len(model.sites)) if sites is None else [model.index(site) for site in sites]
    seen = {}
    with torch.no_grad(), model.hook_reads({i: lambda read, i=i: seen.update({i: read.clone()}) for i in wanted}):
        model.trace(tokens(), MASK)
    with torch.no_grad():
        reads = model.reads(tokens(), MASK, sites)
    assert len(reads) == len(wanted)
    for i, read in zip(wanted, reads, strict=True):
        assert read[0].isfinite().all()
        torch.testing.assert_close(read, seen[i], rtol=0, atol=0, equal_nan=True)


def test_reads_run_neither_later_sublayers_nor_the_unembedding(monkeypatch):
    model = as_residual(neox())
    ran = []
    sublayer = model.sublayer
    monkeypatch.setattr(model, "sublayer", lambda i, *rest: ran.append(i) or sublayer(i, *rest))
    products = []
    unembedding = model.model.get_output_embeddings()
    forward = unembedding.forward
    monkeypatch.setattr(unembedding, "forward", lambda *args: products.append(1) or forward(*args))
    with torch.no_grad():
        model.reads(tokens(), sites=[0])
        assert ran == [0] and not products
        model.reads(tokens(), sites=["final"])
        assert ran == [0, 0, 1] and not products
        model.trace(tokens())
    assert products == [1]


def test_a_hook_on_the_last_read_is_seen_by_reads():
    model = as_residual(neox())
    with torch.no_grad():
        plain = model.reads(tokens(), sites=["final"])[0]
        with model.hook_reads({model.index("final"): lambda read: read + 1}):
            assert torch.equal(model.reads(tokens(), sites=["final"])[0], plain + 1)
