"""Rows in two parts, the first tokens once and what follows after them: the same as in one pass."""

import pytest
import torch
from pairs import sparse_model, tokens

from bridges.models.loading import as_residual
from bridges.models.prefix import PrefixCache, keeps_keys_and_values

FIRST = 4
LEFT_PADDED = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1], [1] * 7])
"""No padding, some among the first tokens, a row whose first tokens are all padding."""


@pytest.fixture(params=["gpt2", "llama", "opt", "bloom", "gemma3_text", "sparse", "sparse with added positions"])
def model(request, tiny):
    if request.param == "sparse":
        return as_residual(sparse_model())
    if request.param.startswith("sparse"):
        return as_residual(sparse_model(d_pos_emb=None))
    window = {"head_dim": 8, "sliding_window": 3} if request.param == "gemma3_text" else {}
    return as_residual(tiny(request.param, **window).double())


def after_prefix(model, ids, mask):
    prefix = model.run_prefix(model.empty_prefix(), ids[:, :FIRST], None if mask is None else mask[:, :FIRST])
    return model.context(ids[:, FIRST:], mask, prefix)


def close(some, whole, mask):
    """Equal at the tokens after the prefix that are no padding."""
    counted = torch.ones_like(whole[:, FIRST:, 0], dtype=torch.bool) if mask is None else mask[:, FIRST:].bool()
    counted &= whole[:, FIRST:].isfinite().all(-1)  # eager attention gives NaN on left padding in float64
    assert counted[0].all()
    torch.testing.assert_close(some[counted], whole[:, FIRST:][counted], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mask", [None, LEFT_PADDED], ids=["no mask", "padded"])
@torch.no_grad()
def test_streams_logits_and_reads_after_a_prefix_are_those_of_the_whole_pass(model, mask):
    whole, context = model.trace(tokens(), mask), after_prefix(model, tokens(), mask)
    for _ in range(2):  # the first pass leaves nothing behind
        split = model.trace_in(context)
        for some, all_tokens in zip(split.residuals, whole.residuals, strict=True):
            close(some, all_tokens, mask)
        close(split.logits, whole.logits, mask)
    for some, all_tokens in zip(model.reads_in(context), model.reads(tokens(), mask), strict=True):
        close(some, all_tokens, mask)


@torch.no_grad()
def test_two_rows_that_begin_alike_share_a_prefix(model):
    other = tokens()
    other[:, FIRST + 1] = (other[:, FIRST + 1] + 3) % 17
    prefix = model.run_prefix(model.empty_prefix(), tokens()[:, :FIRST])
    for ids in (tokens(), other):
        close(model.trace_in(model.context(ids[:, FIRST:], None, prefix)).logits, model.trace(ids).logits, None)


@torch.no_grad()
def test_an_edit_after_a_prefix_gives_the_logits_of_one_in_the_whole_pass(model):
    whole, context = model.trace(tokens()), after_prefix(model, tokens(), None)
    split, site = model.trace_in(context), 1
    addend = torch.zeros_like(whole.residuals[site])
    addend[:, FIRST:] = torch.randn(4, 3, model.d_model, generator=torch.Generator().manual_seed(0)).to(addend)
    edited = model.run_from(site, whole.residuals[site] + addend, tokens())
    close(model.tail(site, split.residuals[site] + addend[:, FIRST:], context), edited, None)


def test_gradients_after_a_prefix_are_those_of_the_whole_pass(model):
    whole = model.trace(tokens(), differentiable=True)
    with torch.no_grad():
        context = after_prefix(model, tokens(), None)
    split = model.trace_in(context, differentiable=True)
    of_whole, of_split = (
        torch.autograd.grad(trace.logits[:, -1].square().sum(), trace.residuals) for trace in (whole, split)
    )
    for some, all_tokens in zip(of_split, of_whole, strict=True):
        torch.testing.assert_close(some, all_tokens[:, FIRST:], rtol=1e-9, atol=1e-10)


def test_a_model_with_other_states_than_attentions_has_no_prefix(tiny):
    assert as_residual(tiny("lfm2")).empty_prefix() is None


def test_a_prefix_says_what_a_token_of_it_takes(tiny):
    model = as_residual(tiny("gpt2"))
    with torch.no_grad():
        prefix = model.run_prefix(model.empty_prefix(), tokens()[:, :FIRST])
    assert prefix.bytes_per_token == 2 * len(model.layers) * model.d_model * 4
    assert not keeps_keys_and_values(prefix) and isinstance(prefix, PrefixCache)
