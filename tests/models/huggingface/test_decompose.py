"""Which layers split in two sublayers, which stay blocks, and which models are refused."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModel, BertConfig, BertLMHeadModel, PretrainedConfig, PreTrainedModel

from bridges.models.huggingface.decompose import difference, same_layer, tolerance
from bridges.models.loading import as_residual

SPLIT = ["0.attn", "0.mlp", "1.attn", "1.mlp", "final"]
BLOCKS = ["0.block", "1.block", "final"]


def test_difference_is_relative_to_the_largest_magnitude():
    theirs = torch.tensor([4.0, -8.0])
    assert difference(theirs, theirs) == 0
    assert difference(theirs + torch.tensor([0.0, 2.0]), theirs) == 0.25
    assert difference(torch.tensor([float("nan")]), torch.tensor([float("nan")])) == float("inf")
    assert difference(torch.tensor([1.0]), torch.tensor([float("inf")])) == float("inf")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, 0), (torch.float32, 0), (torch.bfloat16, 8 / 128), (torch.float16, 8 / 1024)],
)
def test_tolerance_on_a_cpu(dtype, expected):
    assert tolerance(torch.ones(1, dtype=dtype)) == expected


def test_tolerance_elsewhere_allows_another_order_of_summation():
    assert tolerance(torch.ones(1, device="meta")) == 64 * 2.0**-23
    assert tolerance(torch.ones(1, device="meta", dtype=torch.bfloat16)) == 8 * 2.0**-7


def test_a_layer_is_split_when_the_sublayers_fit_and_the_parallel_sum_does_not():
    whole = torch.tensor([100.0, 0.0], dtype=torch.bfloat16)
    near, far = torch.tensor([100.5, 0.0], dtype=torch.bfloat16), torch.tensor([150.0, 0.0], dtype=torch.bfloat16)
    assert same_layer(whole, whole, whole)
    assert same_layer(near, whole, far)
    assert not same_layer(near, whole, near)
    assert not same_layer(far, whole, far)
    assert not same_layer(near.float(), whole.float(), far.float())


@pytest.mark.parametrize(
    ("family", "parallel", "sites"),
    [("gpt_neox", False, SPLIT), ("stablelm", True, BLOCKS), ("stablelm", False, SPLIT), ("gpt_neox", True, BLOCKS)],
)
def test_a_parallel_residual_is_found_by_its_numbers(family, parallel, sites, tiny, tokens):
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny(family, use_parallel_residual=parallel).to(dtype)
        assert as_residual(model).sites == sites


class UnknownLayer(nn.Module):
    """Odd names, keyword-only stream, an attention that averages what came before, a tuple in return."""

    def __init__(self, d, post_norm_bias):
        super().__init__()
        self.mixing = nn.Sequential(_Average(), nn.Linear(d, d))
        self.pointwise = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.scale = nn.Parameter(torch.randn(d))
        self.after = nn.LayerNorm(d) if post_norm_bias else nn.Identity()

    def forward(self, *, hidden_states, strength):
        hidden_states = hidden_states + self.after(self.mixing(hidden_states * self.scale)) * strength
        return hidden_states + self.pointwise(hidden_states * self.scale), "weights"


class _Average(nn.Module):
    def forward(self, x):
        return x.cumsum(-2) / torch.arange(1, 1 + x.shape[-2]).to(x)[:, None]


class UnknownConfig(PretrainedConfig):
    model_type = "unknown"


class UnknownModel(PreTrainedModel):
    """A family of no library; `between` adds to the stream outside the layers, as some published models do."""

    config_class = UnknownConfig

    def __init__(self, n_layers=3, between=0.0, post_norm_bias=False, shared=False, streams=False):
        super().__init__(UnknownConfig(num_hidden_layers=n_layers))
        torch.manual_seed(0)
        self.embed, self.between, self.streams = nn.Embedding(23, 12), between, streams
        layers = [UnknownLayer(12, post_norm_bias) for _ in range(1 if shared else n_layers)]
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


def sites_of_equal_chain(model):
    """The sites of a model whose chain gives its logits bit for bit."""
    ids = torch.randint(23, (2, 7), generator=torch.Generator().manual_seed(0))
    chain = as_residual(model.eval())
    with torch.no_grad():
        assert torch.equal(chain.residuals(ids)[1], model(ids).logits)
    return chain.sites


def test_an_unknown_family_is_split_like_any_other():
    assert sites_of_equal_chain(UnknownModel()) == ["0.attn", "0.mlp", "1.attn", "1.mlp", "2.attn", "2.mlp", "final"]


def test_a_layer_with_a_bias_after_its_zeroed_submodule_is_a_block():
    assert sites_of_equal_chain(UnknownModel(post_norm_bias=True)) == ["0.block", "1.block", "2.block", "final"]


def test_something_added_between_layers_is_refused():
    with pytest.raises(
        ValueError, match=r"model='unknown' cannot be split into sublayers.* differ .* by [0-9.e-]+ .*layer 2"
    ):
        as_residual(UnknownModel(between=0.1).eval())
    as_residual(UnknownModel(between=0.0).eval())


def test_layers_that_are_one_module_are_refused():
    with pytest.raises(ValueError, match=r"'unknown'.*3 decoder layers, but 1 different"):
        as_residual(UnknownModel(shared=True).eval())


def test_several_streams_are_refused():
    with pytest.raises(ValueError, match=r"'unknown'.*layer 1 is given a stream of shape \[1, 3, 8, 12\]"):
        as_residual(UnknownModel(streams=True).eval())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("module", "where"), [("h.0.mlp.c_fc", "input of layer 1"), ("ln_f", "after the last layer")])
def test_a_model_that_is_not_finite_is_refused(module, where, value, tiny):
    model = tiny("gpt2")
    model.transformer.get_submodule(module).bias.data[3] = value
    with pytest.raises(ValueError, match=rf"model='gpt2'.*inf \(relative\).*{where}.*not finite"):
        as_residual(model)


def test_a_model_without_a_head_and_a_plain_module_are_refused(tiny):
    with pytest.raises(ValueError, match=r"model=LlamaModel is not .* with an unembedding; load it through AutoModelF"):
        as_residual(AutoModel.from_config(tiny("llama").config))
    with pytest.raises(ValueError, match="model=Linear is not a Hugging Face language model"):
        as_residual(nn.Linear(2, 2))
    headless = UnknownModel()
    headless.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="'unknown' has no list of its 7 decoder layers"):
        as_residual(headless)


def test_a_model_that_looks_ahead_is_refused():
    config = BertConfig(
        vocab_size=19,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        is_decoder=False,
    )
    with pytest.raises(ValueError, match="model='bert' is not a decoder: its last token changes earlier logits"):
        as_residual(BertLMHeadModel(config).eval())
