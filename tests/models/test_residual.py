import pytest
import torch
from torch import nn

from bridges.models.loading import as_residual
from bridges.models.residual import Site, input_device


@pytest.fixture
def model(tiny):
    return tiny("gpt2")


@pytest.fixture
def chain(model):
    return as_residual(model)


def test_a_site_equals_its_name():
    site = Site("12.mlp")
    assert site == "12.mlp" and hash(site) == hash("12.mlp") and {site: 1}["12.mlp"] == 1
    assert (site.layer, site.kind) == (12, "mlp")
    assert (Site("final").layer, Site("final").kind) == (None, "final")


def test_sites_are_found_by_name_and_by_index(chain):
    assert [chain.index(site) for site in chain.sites] == [0, 1, 2, 3, 4]
    assert (chain.index(0), chain.index(-1), chain.index(4), chain.index("1.attn")) == (0, 4, 4, 2)


@pytest.mark.parametrize("site", ["2.attn", "", "0.block", 5, -6])
def test_an_unknown_site_is_refused_with_a_list_of_the_sites(chain, site):
    with pytest.raises(ValueError, match=f"site={site!r} is not .* 0.attn, 0.mlp, 1.attn, 1.mlp, final"):
        chain.index(site)


def test_the_chain_composes(chain, tokens, padding):
    with torch.no_grad():
        trace = chain.trace(tokens, padding)
        assert trace.context.embedding is trace.residuals[0]
        for start in range(5):
            for stop in range(start, 5):
                there = chain.run(start, stop, trace.residuals[start], trace.context)
                assert torch.equal(there, trace.residuals[stop])
            assert torch.equal(chain.tail(start, trace.residuals[start], trace.context), trace.logits)
        residuals, logits = chain.residuals(tokens, padding)
    assert torch.equal(logits, trace.logits)
    assert all(torch.equal(one, other) for one, other in zip(residuals, trace.residuals, strict=True))


def test_a_trace_without_logits_may_end_at_a_site(chain, tokens, padding):
    whole, part = chain.trace(tokens, padding), chain.trace(tokens, padding, with_logits=False, last_site=2)
    assert len(part.residuals) == 3 and part.logits.shape == (3, 9, 0)
    assert all(torch.equal(one, other) for one, other in zip(part.residuals, whole.residuals, strict=False))
    assert torch.equal(chain.trace(tokens, padding, last_site=2).logits, whole.logits)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_differentiable_trace_has_a_gradient_at_every_site_of_a_frozen_model(tiny, tokens, padding, family):
    chain = as_residual(tiny(family).double().requires_grad_(False))
    with torch.no_grad():
        plain, trace = (chain.trace(tokens, padding, differentiable) for differentiable in (False, True))
    assert not plain.logits.requires_grad and torch.equal(plain.logits, trace.logits)
    with torch.enable_grad():
        found = torch.autograd.grad(trace.logits[padding.bool()].sin().sum(), trace.residuals)
        for site, gradient in enumerate(found):
            stream = plain.residuals[site].clone().requires_grad_()
            logits = chain.tail(site, stream, plain.context)
            expected = torch.autograd.grad(logits[padding.bool()].sin().sum(), stream)[0]
            torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_dtype_and_device_are_the_models(tiny):
    chain = as_residual(tiny("gpt2").to(torch.bfloat16))
    assert (chain.dtype, chain.device) == (torch.bfloat16, torch.device("cpu"))


def test_token_ids_go_to_the_device_that_accelerate_brings_weights_to():
    class Hook:
        execution_device = "cpu"

    class Several:
        hooks = (Hook(),)

    model = nn.Sequential(nn.Linear(2, 2, device="meta"))
    assert input_device(model) == torch.device("meta")
    for hook in (Hook(), Several()):
        model[0]._hf_hook = hook
        assert input_device(model) == torch.device("cpu")


def test_a_hook_is_called_once_per_read_and_what_it_returns_replaces_the_read(model, chain, tokens):
    """Against the model's own forward with a hand-made hook on the MLP of layer 0 and the attention of layer 1."""
    reads, seen = chain.reads(tokens), []

    def double(read):
        seen.append(read)
        return read * 2 + 1

    with torch.no_grad(), chain.hook_reads({1: double, 2: double}):
        logits = chain.trace(tokens).logits
    assert len(seen) == 2 and torch.equal(seen[0], reads[1]) and not torch.equal(seen[1], reads[2])
    handles = [
        module.register_forward_pre_hook(lambda _, args: (args[0] * 2 + 1, *args[1:]))
        for module in (model.transformer.h[0].mlp, model.transformer.h[1].attn)
    ]
    with torch.no_grad():
        assert torch.equal(logits, model(tokens, use_cache=False).logits)
    for handle in handles:
        handle.remove()


def test_a_read_given_as_a_keyword_argument_is_replaced_too(tiny, tokens):
    model = tiny("llama")
    chain = as_residual(model)
    with torch.no_grad(), chain.hook_reads({2: lambda read: read + 1}):
        inside = model(tokens, use_cache=False).logits
    handle = model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "hidden_states": kwargs["hidden_states"] + 1}), with_kwargs=True
    )
    with torch.no_grad():
        assert torch.equal(inside, model(tokens, use_cache=False).logits)
    handle.remove()


def test_hooks_are_removed_after_an_exception(chain, tokens):
    with torch.no_grad():
        logits = chain.trace(tokens).logits
        with pytest.raises(KeyError), chain.hook_reads({i: lambda read: read * 0 for i in range(5)}):
            raise KeyError
        assert torch.equal(chain.trace(tokens).logits, logits)


def test_a_hook_that_returns_none_changes_no_bit(chain, tokens):
    with torch.no_grad():
        logits = chain.trace(tokens).logits
        with chain.hook_reads({i: lambda read: None for i in range(5)}):
            assert torch.equal(chain.trace(tokens).logits, logits)


WITH_A_MASK = {
    "residuals": lambda chain, ids, mask: chain.residuals(ids, mask)[0],
    "reads": lambda chain, ids, mask: chain.reads(ids, mask),
    "run_from": lambda chain, ids, mask: [chain.run_from("1.attn", torch.ones(3, 9, 32), ids, mask)],
}


@pytest.mark.parametrize("method", WITH_A_MASK)
def test_a_mask_is_one_of_ones_and_zeros_whatever_its_type(chain, tokens, padding, method, unchecked):
    run, real = WITH_A_MASK[method], padding.bool()
    with torch.no_grad():
        expected = run(chain, tokens, padding)
        for mask in (real, padding.float(), padding.to(torch.uint8)):
            for one, other in zip(run(chain, tokens, mask), expected, strict=True):
                assert torch.equal(one[real], other[real])
        with pytest.raises(ValueError, match=r"attention_mask holds 2; it must be 1 .* make each document a row"):
            run(chain, tokens, padding * torch.tensor([1, 1, 1, 2, 2, 2, 2, 2, 2]))
        with pytest.raises(ValueError, match=r"attention_mask \(3, 5\) must have the shape \(3, 9\)"):
            run(chain, tokens, padding[:, :5])


def test_under_padding_any_token_gives_the_same_streams(tiny, tokens, padding):
    chain, other = as_residual(tiny("llama")), tokens.masked_fill(padding == 0, 0)
    with torch.no_grad():
        one, two = (chain.residuals(ids, padding)[0] for ids in (tokens, other))
    assert not torch.equal(tokens, other)
    assert all(torch.equal(a[padding.bool()], b[padding.bool()]) for a, b in zip(one, two, strict=True))
