"""The chain of sublayers against the model's own forward pass."""

import inspect

import pytest
import torch

from bridges.models.loading import as_residual

SPLIT = ["0.attn", "0.mlp", "1.attn", "1.mlp", "final"]
BLOCKS = ["0.block", "1.block", "final"]
FAMILIES = {
    "gpt2": SPLIT,
    "llama": SPLIT,
    "qwen3": SPLIT,
    "gemma2": SPLIT,
    "gpt_neox": BLOCKS,
    "bloom": BLOCKS,
    "mixtral": SPLIT,
    "opt": BLOCKS,
    "olmo2": SPLIT,
    "phi": BLOCKS,
    "mamba": BLOCKS,
    "lfm2": SPLIT,
    "gpt_oss": SPLIT,
    "gpt_bigcode": SPLIT,
    "falcon": BLOCKS,
    "exaone4": SPLIT,
    "granite": SPLIT,
    "nemotron": SPLIT,
    "stablelm": SPLIT,
    "gptj": BLOCKS,
    "mpt": BLOCKS,
    "qwen3_moe": SPLIT,
}


def own_logits(model, ids, mask=None):
    """The model's own forward, positions counted from each row's first real token."""
    inputs = {"input_ids": ids, "use_cache": False}
    if mask is not None:
        inputs["attention_mask"] = mask
        if "position_ids" in inspect.signature(model.forward).parameters:
            inputs["position_ids"] = torch.tensor(
                [[max(0, sum(row[: i + 1]) - 1) for i in range(len(row))] for row in mask.tolist()]
            )
    with torch.no_grad():
        return model(**inputs).logits


def check_identity(model, ids, mask, atol=0.0):
    chain = as_residual(model)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    theirs = own_logits(model, ids, mask)[real]
    with torch.no_grad():
        residuals, logits = chain.residuals(ids, mask)
        assert len(residuals) == len(chain.sites)
        for ours in [logits, *(chain.run_from(s, h, ids, mask) for s, h in zip(chain.sites, residuals, strict=True))]:
            torch.testing.assert_close(ours[real], theirs, rtol=0, atol=atol)
    return chain


@pytest.mark.parametrize("family", FAMILIES)
def test_the_chain_is_the_model_bit_for_bit(family, tiny, tokens, padding):
    model = tiny(family)
    chain = check_identity(model, tokens, None)
    check_identity(model, tokens, padding)
    assert chain.sites == FAMILIES[family] and len(chain.sites) == len(FAMILIES[family])
    assert (chain.d_model, chain.vocab_size, chain.family) == (32, 61, family)


def in_float64(tiny, family):
    # Eager, because grouped matrix products for experts know no float64.
    return tiny(family, **({"experts_implementation": "eager"} if family == "mixtral" else {})).double()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "bloom", "mixtral", "opt", "gpt_neox", "qwen3"])
def test_the_chain_is_the_model_in_float64(family, tiny, tokens, padding):
    model = in_float64(tiny, family)
    chain = check_identity(model, tokens, None, atol=1e-10)
    if family in ("gemma2", "bloom"):  # their own answer to left padding in float64 is NaN
        padding[0] = padding[1]
    check_identity(model, tokens, padding, atol=1e-10)
    assert chain.sites == FAMILIES[family] and chain.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox", "phi"])
def test_half_precision_splits_the_same_layers(family, dtype, tiny, tokens, padding):
    model = tiny(family).to(dtype)
    eps = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    largest = own_logits(model, tokens, padding).abs().max().item()
    chain = check_identity(model, tokens, padding, atol=8 * eps * largest)
    assert chain.sites == FAMILIES[family]


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "falcon", "mamba", "lfm2", "opt", "mixtral", "mpt"])
def test_padding_and_batch_mates_do_not_reach_a_row(family, tiny, tokens, padding):
    eager = family in ("bloom", "mpt")  # their own answer to left padding in float64 is NaN
    chain = as_residual(tiny(family) if eager else in_float64(tiny, family))
    with torch.no_grad():
        residuals, logits = chain.residuals(tokens, padding)
        for row in range(3):
            alone = tokens[row][padding[row].bool()][None]
            expected, expected_logits = chain.residuals(alone)
            # Norms and rotary tables of some families compute in float32 whatever the model's dtype.
            atol = 1e-12 if family in ("gpt2", "opt") else 1e-5 if eager else 1e-6
            torch.testing.assert_close(logits[row][padding[row].bool()][None], expected_logits, rtol=0, atol=atol)
            for ours, theirs in zip(residuals, expected, strict=True):
                torch.testing.assert_close(ours[row][padding[row].bool()][None], theirs, rtol=0, atol=atol)


def test_zeroed_and_skipped_modules_are_not_computed(tiny, tokens):
    model = tiny("gpt2")
    chain = as_residual(model)
    calls = []
    for i, block in enumerate(model.transformer.h):
        for name, module in {"attn": block.attn.c_attn, "mlp": block.mlp.c_fc, "whole attn": block.attn}.items():
            module.register_forward_hook(lambda *_, key=f"{i}.{name}": calls.append(key))
    context = chain.context(tokens)
    chain.head(context.embedding, context)
    assert calls == []
    chain.sublayer(0, context.embedding, context)
    assert calls == ["0.attn", "0.whole attn"]
    calls.clear()
    chain.sublayer(3, context.embedding, context)
    assert calls == ["1.mlp"]
    calls.clear()
    chain.run_from("1.attn", context.embedding, tokens)
    assert calls == ["1.attn", "1.whole attn", "1.mlp"]


def snapshot(model):
    return {
        name: (
            module.training,
            {key: id(value) for key, value in vars(module).items() if key not in ("training", "_parameters")},
            [len(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")],
        )
        for name, module in model.named_modules()
    }


def test_the_users_model_is_left_as_it_was(tiny, tokens, padding):
    model = tiny("gpt2").train()
    model.transformer.h[1].eval()
    model.transformer.h[0].attn.forward = model.transformer.h[0].attn.forward
    model.transformer.h[0].attn.register_forward_hook(lambda *_: None)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    before, state = snapshot(model), torch.get_rng_state()
    chain = as_residual(model)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        residuals, _ = chain.residuals(tokens, padding)
        chain.reads(tokens)
    with pytest.raises((RuntimeError, TypeError)):
        chain.sublayer(0, residuals[0][..., :5].squeeze(-1), chain.context(tokens))
    assert snapshot(model) == before
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and parameter.requires_grad and torch.equal(parameter, weights[name])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_gradients_are_those_of_the_whole_model(family, tiny, tokens, padding):
    model = tiny(family).double()
    if family == "gemma2":  # its own answer to left padding in float64 is NaN
        padding[0] = padding[1]
    chain = as_residual(model)
    site = 2 if len(chain.sites) == 5 else 1  # the input of layer 1
    leaf = chain.residuals(tokens, padding)[0][site].detach().requires_grad_()
    weights = (
        torch.randn(3, 9, 61, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * padding[..., None]
    )
    wanted = [leaf, *chain.layers[1].parameters(), model.get_output_embeddings().weight]

    def layer_starts_at_leaf(_module, args, kwargs):
        return ((leaf, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": leaf})

    ours = torch.autograd.grad((chain.run_from(site, leaf, tokens, padding) * weights).sum(), wanted, allow_unused=True)
    handle = chain.layers[1].register_forward_pre_hook(layer_starts_at_leaf, with_kwargs=True)
    positions = (padding.cumsum(-1) - 1).clamp(min=0)
    logits = model(tokens, attention_mask=padding, position_ids=positions, use_cache=False).logits
    handle.remove()
    theirs = torch.autograd.grad((logits * weights).sum(), wanted, allow_unused=True)
    assert ours[0].abs().max() > 0
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_the_gradient_of_a_half_layer_is_right_by_finite_differences(tiny, tokens):
    chain = as_residual(tiny("gpt2").double())
    residual = chain.residuals(tokens[:1, :3])[0][3].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda h: chain.run_from("1.mlp", h, tokens[:1, :3]), (residual,), fast_mode=True)


def read_modules(family, model):
    """Where each site is read in the model's own forward."""
    base = model.base_model
    layers = getattr(base, "layers", None) or base.h
    names = {
        "gpt2": ("attn", "mlp"),
        "llama": ("self_attn", "mlp"),
        "gemma2": ("self_attn", "mlp"),
        "mixtral": ("self_attn", "mlp"),
        "lfm2": (None, "feed_forward"),
        "gpt_neox": ("attention",),
        "bloom": ("self_attention",),
        "mamba": ("mixer",),
    }[family]
    mixing = [layer.conv if hasattr(layer, "conv") else getattr(layer, "self_attn", None) for layer in layers]
    modules = [getattr(layer, n) if n else mixing[i] for i, layer in enumerate(layers) for n in names]
    return [*modules, model.get_output_embeddings()]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "mixtral", "lfm2", "gpt_neox", "bloom", "mamba"])
def test_reads_are_what_the_modules_are_given(family, tiny, tokens, padding):
    model = tiny(family)
    chain = as_residual(model)
    modules, seen = read_modules(family, model), {}
    assert [chain.read_modules(i)[0] for i in range(len(chain.sites))] == modules

    def note(module, args, kwargs):
        seen[module] = (args[0] if args else kwargs["hidden_states"]).clone()

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    own_logits(model, tokens, padding)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        reads = chain.reads(tokens, padding)
    assert len(reads) == len(modules)
    for read, module in zip(reads, modules, strict=True):
        assert torch.equal(read[padding.bool()], seen[module][padding.bool()])


def test_context_length_is_the_configurations(tiny):
    assert as_residual(tiny("gpt2")).context_length == 64
    assert as_residual(tiny("bloom")).context_length is None
