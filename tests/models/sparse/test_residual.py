import pytest
import torch

from bridges.models.loading import as_residual
from bridges.models.sparse.model import SparseConfig, SparseTransformer

SHAPE = {"vocab_size": 19, "block_size": 9, "n_layer": 2, "d_model": 16, "n_head": 2, "d_head": 4, "d_mlp": 24}
SITES = ["0.attn", "0.mlp", "1.attn", "1.mlp", "final"]
OPTIONS = {
    "defaults": {"enable_bigram_table": True, "learnable_bigram_table": True},
    "concatenated positions": {"d_pos_emb": 6, "sink": False},
    "LayerNorm": {"rms_norm": False, "afrac": None, "residual_activation_type": "relu"},
}


def build(**options):
    torch.manual_seed(0)
    model = SparseTransformer(SparseConfig(**{**SHAPE, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.3, 0.4)
    return model.eval()


@pytest.fixture(params=OPTIONS)
def model(request):
    return build(**OPTIONS[request.param])


@pytest.fixture
def ids():
    return torch.randint(0, 19, (3, 6), generator=torch.Generator().manual_seed(1))


def test_run_from_every_site_gives_the_models_own_bits(model, ids):
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    chain = as_residual(model)
    residuals, logits = chain.residuals(ids, mask)
    assert chain.sites == SITES and len(residuals) == 5
    assert torch.equal(logits, model(ids, attention_mask=mask).logits)
    for site, residual in zip(SITES, residuals, strict=True):
        assert torch.equal(chain.run_from(site, residual, ids, mask), logits)


def test_widths_sites_and_context_are_the_models():
    chain = as_residual(build())
    assert (chain.d_model, chain.vocab_size, chain.context_length) == (16, 19, 9)
    assert [(site.layer, site.kind) for site in chain.sites][3:] == [(1, "mlp"), (None, "final")]


def test_reads_are_the_norms_output_after_abs_topk_without_position_channels(ids):
    model = build(d_pos_emb=6)
    chain = as_residual(model)
    residuals, _ = chain.residuals(ids)
    reads = chain.reads(ids)
    positions = model.transformer.wpe.weight[:6].expand(3, 6, 6)
    for index, (residual, read) in enumerate(zip(residuals[:-1], reads, strict=False)):
        block = model.blocks[index // 2]
        norms = (block.ln_2, block.ln_p2) if index % 2 else (block.ln_1, block.ln_p1)
        both = torch.cat([norms[0](residual), norms[1](positions)], -1)
        kept = both.abs().topk(5, -1).indices  # int(0.25 * 22)
        expected = torch.zeros_like(both).scatter(-1, kept, both.gather(-1, kept))[..., :16]
        assert torch.equal(read, expected)
    assert torch.equal(reads[-1], model.transformer.ln_f(residuals[-1]))


def test_gain_and_centring_give_the_read(model, ids):
    model.config.afrac = None
    for module in model.modules():
        if hasattr(module, "k"):
            module.k = None
    chain = as_residual(model)
    residuals, _ = chain.residuals(ids)
    for index, (residual, read) in enumerate(zip(residuals, chain.reads(ids), strict=True)):
        norm = chain.norm(index)
        assert norm.present and norm.gain.dtype == torch.float32 and not norm.gain.requires_grad
        x = residual - residual.mean(-1, keepdim=True) if norm.centred else residual
        shift = read.new_zeros(16) if not norm.centred else chain_bias(model, index)
        expected = x / x.pow(2).mean(-1, keepdim=True).add(1e-5 if norm.centred else 2.0**-23).sqrt() * norm.gain
        torch.testing.assert_close(read, expected + shift, rtol=1e-4, atol=1e-5)


def chain_bias(model, index):
    norms = [norm for block in model.blocks for norm in (block.ln_1, block.ln_2)]
    return [*norms, model.transformer.ln_f][index].bias


def test_the_gain_of_a_double_model_stays_double():
    chain = as_residual(build().double())
    assert chain.norm(0).gain.dtype == torch.float64
    assert as_residual(build().bfloat16()).norm(0).gain.dtype == torch.float32


def test_sublayers_of_one_context_share_no_graph(ids):
    """Each sublayer can be taken back alone, twice over, though all read the trained positions."""
    model = build(d_pos_emb=6)
    chain = as_residual(model)
    with torch.no_grad():
        context = chain.context(ids)
        residuals = chain.trace(ids).residuals
    for index in (0, 1, 2, 3, 0):
        chain.sublayer(index, residuals[index], context).sum().backward()
    once = model.transformer.wpe.weight.grad.clone()
    assert once[:6].any() and not once[6:].any()


def test_a_row_over_the_context_length_is_refused():
    with pytest.raises(ValueError, match="block_size=9"):
        as_residual(build()).context(torch.zeros(1, 10, dtype=torch.long))
