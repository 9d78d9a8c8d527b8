"""Fits between real models: what the closed form alone brings, at a few sites of very different scales."""

import math
import sysconfig
from copy import deepcopy
from pathlib import Path

import pytest
import torch

import bridges

pytestmark = pytest.mark.real

SITES = ("0.attn", "4.attn", "15.mlp", "final")
"""The embedding, a site of many long tokens, one where massive tokens hold most of the variance, the last stream."""
SETTINGS = {"sites": SITES, "steps": 0, "k": 576, "closed_form_tokens": 12_000, "eval_tokens": 512, "progress": False}


@pytest.fixture(scope="module")
def rows(tokenizer):
    """Text of the standard library, 128 tokens a row."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))
    text = "".join(file.read_text(errors="ignore") for file in files)[:500_000]
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    ids = ids[: len(ids) // 128 * 128].view(-1, 128)
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]


def pruned(model):
    """A copy whose matrices have the smaller half of their weights set to zero."""
    model = deepcopy(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight[weight.abs() <= weight.abs().median()] = 0
    return model


def test_a_model_bridged_to_itself_loses_nothing(model, rows):
    report = bridges.fit(model, model, rows, **SETTINGS).report
    for site in report.sites:
        assert site.nmse_encode < 1e-6 and site.nmse_decode < 1e-6, site.name
        assert site.kl_dense_to_sparse < 1e-3 and site.kl_sparse_to_dense < 1e-3, site.name
    # About one token in two thousand is massive at 15.mlp, so few held-out rows may hold none.
    assert all(site.massive_share < 0.02 for site in report.sites) and report.sites[0].massive_share == 0


def test_a_pruned_partner_is_better_than_the_mean_at_every_site(model, rows):
    report = bridges.fit(model, pruned(model), rows, **SETTINGS).report
    for site in report.sites:
        assert site.nmse_encode < 0.6 and site.nmse_decode < 0.6, site.name
        assert math.isfinite(site.nmse_decode_all_tokens)
        if site.massive_share == 0:  # massive tokens are attention sinks, fitted to where the others hardly suffer
            assert site.kl_sparse_to_dense < site.kl_sparse_to_dense_mean_ablation / 2, site.name
