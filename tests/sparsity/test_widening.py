"""A widened model computes the same, with as many nonzeros a row."""

from __future__ import annotations

import pytest
import torch

from bridges import SparseConfig, SparseTransformer, load_pair
from bridges.sparsity.projection import project, supports
from bridges.sparsity.widening import widen

IDS = torch.randint(23, (3, 9), generator=torch.Generator().manual_seed(1))


def model(**settings) -> SparseTransformer:
    torch.manual_seed(0)
    config = SparseConfig(
        vocab_size=23, n_layer=2, d_model=32, d_mlp=48, n_head=2, d_head=16, block_size=16, **settings
    )
    made = SparseTransformer(config).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():  # biases, sinks and norms that differ from their start
            parameter.add_(0.3 * torch.randn_like(parameter))
    project(made, 0.2, 1)
    return made


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rms_norm": False},
        {"sink": False, "bias": False},
        {"residual_activation_type": "relu"},
        {"afrac": None},
        {"enable_bigram_table": True},
    ],
)
def test_same_logits(settings, factor):
    narrow = model(**settings)
    wide = widen(narrow, factor)
    assert wide.config.d_model == 32 * factor
    torch.testing.assert_close(wide(IDS).logits, narrow(IDS).logits, rtol=1e-9, atol=1e-9)


def test_rows_and_columns_keep_their_number_of_nonzeros():
    before, after = supports(model()), supports(widen(model(), 2))
    for name in ("transformer.h.1.mlp.c_fc.weight", "transformer.h.1.attn.c_proj.weight"):
        torch.testing.assert_close(after[name].sum(1), before[name].sum(1).repeat(2))
        torch.testing.assert_close(after[name].sum(0), before[name].sum(0).repeat(2))
    name = "transformer.wte.weight"
    torch.testing.assert_close(after[name].sum(1), 2 * before[name].sum(1))
    torch.testing.assert_close(after["lm_head.weight"].sum(1), before["lm_head.weight"].sum(1))


def test_copies_of_a_neuron_get_different_gradients():
    wide = widen(model(), 2).train()
    wide(IDS, labels=IDS).loss.backward()
    gradient = wide.blocks[0].mlp.c_fc.weight.grad
    assert gradient is not None
    assert not torch.allclose(gradient[:48], gradient[48:])


def test_given_model_stays_and_seed_decides():
    narrow = model()
    before = {name: value.clone() for name, value in narrow.state_dict().items()}
    one, same, other = widen(narrow, 2, seed=3), widen(narrow, 2, seed=3), widen(narrow, 2, seed=4)
    assert all(torch.equal(value, before[name]) for name, value in narrow.state_dict().items())
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_bundled_model():
    _, sparse, _ = load_pair()
    ids = torch.randint(1024, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(widen(sparse)(ids).logits, sparse(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "factor", "message"),
    [
        ({"tied_unembed": True}, 2, "tied_unembed"),
        ({"d_pos_emb": 8}, 2, "d_pos_emb=8"),
        ({"afrac": 0.17}, 3, "afrac=0.17"),
        ({}, 1, "factor=1"),
    ],
)
def test_refused(settings, factor, message):
    with pytest.raises(ValueError, match=message):
        widen(model(**settings), factor)
