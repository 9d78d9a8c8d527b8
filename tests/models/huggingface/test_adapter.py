import inspect
from types import SimpleNamespace

import accelerate
import pytest
import torch
from torch import nn
from transformers import AutoModel, BertConfig, BertLMHeadModel, PretrainedConfig, PreTrainedModel

from bridges.models.loading import as_residual
from bridges.models.sparse.model import SparseConfig, SparseTransformer

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


@pytest.mark.parametrize(
    ("family", "parallel", "sites"),
    [("gpt_neox", False, SPLIT), ("stablelm", True, BLOCKS), ("stablelm", False, SPLIT), ("gpt_neox", True, BLOCKS)],
)
def test_a_parallel_residual_is_told_by_numbers_not_by_name(family, parallel, sites, tiny, tokens):
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny(family, use_parallel_residual=parallel).to(dtype)
        assert as_residual(model).sites == sites


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


class NobodysLayer(nn.Module):
    """Odd names, keyword-only stream, an attention that averages what came before, a tuple in return."""

    def __init__(self, d, post_norm_bias):
        super().__init__()
        self.looks_back = nn.Sequential(_Average(), nn.Linear(d, d))
        self.thinks = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.scale = nn.Parameter(torch.randn(d))
        self.after = nn.LayerNorm(d) if post_norm_bias else nn.Identity()

    def forward(self, *, hidden_states, strength):
        hidden_states = hidden_states + self.after(self.looks_back(hidden_states * self.scale)) * strength
        return hidden_states + self.thinks(hidden_states * self.scale), "weights"


class _Average(nn.Module):
    def forward(self, x):
        return x.cumsum(-2) / torch.arange(1, 1 + x.shape[-2]).to(x)[:, None]


class NobodysConfig(PretrainedConfig):
    model_type = "nobodys"


class NobodysModel(PreTrainedModel):
    """A family that nobody named; `between` adds to the stream outside the layers, as some published models do."""

    config_class = NobodysConfig

    def __init__(self, n_layers=3, between=0.0, post_norm_bias=False, shared=False, streams=False):
        super().__init__(NobodysConfig(num_hidden_layers=n_layers))
        torch.manual_seed(0)
        self.embed, self.between, self.streams = nn.Embedding(23, 12), between, streams
        layers = [NobodysLayer(12, post_norm_bias) for _ in range(1 if shared else n_layers)]
        self.steps = nn.ModuleList(layers * (n_layers // len(layers)))
        self.out = nn.Linear(12, 23)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.normal_(module.bias)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.out

    def forward(self, input_ids, use_cache=None, attention_mask=None):
        hidden = first = self.embed(input_ids)
        for i, step in enumerate(self.steps):
            if i == 2:
                hidden = hidden + self.between * first
            hidden = step(hidden_states=hidden, strength=1.5)[0]
            hidden = hidden[None] if self.streams and i == 0 else hidden
        return SimpleNamespace(logits=self.out(hidden))


def test_a_family_that_nobody_named():
    ids = torch.randint(23, (2, 7), generator=torch.Generator().manual_seed(0))
    chain = check_identity(NobodysModel().eval(), ids, None)
    assert chain.sites == ["0.attn", "0.mlp", "1.attn", "1.mlp", "2.attn", "2.mlp", "final"]


def test_a_silenced_sublayer_that_still_adds_its_bias_makes_a_block():
    ids = torch.randint(23, (2, 7), generator=torch.Generator().manual_seed(0))
    chain = check_identity(NobodysModel(post_norm_bias=True).eval(), ids, None)
    assert chain.sites == ["0.block", "1.block", "2.block", "final"]


def test_silenced_and_skipped_modules_are_not_computed(tiny, tokens):
    model = tiny("gpt2")
    chain = as_residual(model)
    calls = []
    for i, block in enumerate(model.transformer.h):
        for name, module in {"attn": block.attn.c_attn, "mlp": block.mlp.c_fc, "whole attn": block.attn}.items():
            module.register_forward_hook(lambda *_, place=f"{i}.{name}": calls.append(place))
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


def test_something_added_between_layers_is_refused():
    with pytest.raises(ValueError, match=r"model='nobodys' cannot be taken apart.* differ .* by [0-9.e-]+ .*layer 2"):
        as_residual(NobodysModel(between=0.1).eval())
    as_residual(NobodysModel(between=0.0).eval())


def test_layers_that_are_one_module_are_refused():
    with pytest.raises(ValueError, match=r"'nobodys'.*3 decoder layers, but 1 different"):
        as_residual(NobodysModel(shared=True).eval())


def test_several_streams_are_refused():
    with pytest.raises(ValueError, match=r"'nobodys'.*layer 1 is given a stream of shape \[1, 3, 8, 12\]"):
        as_residual(NobodysModel(streams=True).eval())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("place", "where"), [("h.0.mlp.c_fc", "input of layer 1"), ("ln_f", "after the last layer")])
def test_what_is_not_finite_is_refused(place, where, value, tiny):
    model = tiny("gpt2")
    model.transformer.get_submodule(place).bias.data[3] = value
    with pytest.raises(ValueError, match=rf"model='gpt2'.*inf \(relative\).*{where}.*not finite"):
        as_residual(model)


def test_a_model_without_a_head_and_a_plain_module_are_refused(tiny):
    with pytest.raises(ValueError, match=r"model=LlamaModel is not .* with an unembedding; load it through AutoModelF"):
        as_residual(AutoModel.from_config(tiny("llama").config))
    with pytest.raises(ValueError, match="model=Linear is not a Hugging Face language model"):
        as_residual(nn.Linear(2, 2))
    headless = NobodysModel()
    headless.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="'nobodys' has no list of its 7 decoder layers"):
        as_residual(headless)


def test_what_is_a_chain_already_stays_one(tiny):
    chain = as_residual(tiny("gpt2"))
    assert as_residual(chain) is chain
    shape = {"vocab_size": 19, "block_size": 9, "n_layer": 1, "d_model": 16, "n_head": 2, "d_head": 4, "d_mlp": 24}
    sparse = SparseTransformer(SparseConfig(**shape))
    assert as_residual(sparse).model is sparse


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


def offload_all(model, _folder):
    return accelerate.cpu_offload(model, execution_device="cpu")


def spread(model, folder):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


def one_place(model, _folder):
    return accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


@pytest.mark.parametrize("place", [offload_all, spread, one_place])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_spread_by_accelerate(place, dtype, tiny, tokens, padding, tmp_path):
    plain = as_residual(tiny("llama").to(dtype))
    model = place(tiny("llama").to(dtype), tmp_path)
    own = {module: vars(module)["forward"] for module in model.modules() if "forward" in vars(module)}
    assert len(own) > 5
    chain = as_residual(model)
    assert chain.device == torch.device("cpu") and chain.sites == SPLIT
    with torch.no_grad():
        expected, logits = plain.residuals(tokens, padding)
        ours, our_logits = chain.residuals(tokens, padding)
        assert torch.equal(our_logits, logits)
        for i, (one, other) in enumerate(zip(ours, expected, strict=True)):
            assert torch.equal(one, other)
            assert torch.equal(chain.run_from(i, one, tokens, padding), logits)
        for one, other in zip(chain.reads(tokens), plain.reads(tokens), strict=True):
            assert torch.equal(one, other)
    assert {module: vars(module)["forward"] for module in model.modules() if "forward" in vars(module)} == own
    assert torch.equal(chain.norm(0).gain, plain.norm(0).gain) or place is not one_place


def test_context_length_is_the_configurations(tiny):
    assert as_residual(tiny("gpt2")).context_length == 64
    assert as_residual(tiny("bloom")).context_length is None


def test_a_model_that_looks_ahead_is_refused():
    config = BertConfig(
        vocab_size=19,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        is_decoder=False,
    )
    with pytest.raises(ValueError, match="model='bert' is no decoder: its last token changes earlier logits"):
        as_residual(BertLMHeadModel(config).eval())
