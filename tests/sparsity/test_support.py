import copy
import sys

import pytest
import torch
from pairs import MASK, gpt2, gradients, join, relative, sparse_model, tokens

from bridges.config import FitConfig
from bridges.fitting.gradients import Objective, Weights, step_gradients
from bridges.fitting.processes import ProcessGroup
from bridges.fitting.trainer import Trainer
from bridges.sparsity import projection as sparsity
from bridges.sparsity.support import Support, skip_zeros, use_sparse_kernels

sparse_linear_module = sys.modules["bridges.ops.sparse_linear"]
SETTINGS = {"steps": 5, "train_sparse": True, "sites_per_step": "all", "sparse_lr": 0.02, "sparse_weight_decay": 0.3}


def projected(kept=0.08, **options):
    model = sparse_model(**options)
    sparsity.project(model, kept, min_per_channel=0)
    return model


def train_by_hand(pair, batches, config):
    """The same training on whole tensors: AdamW, then zeros outside the support."""
    model = pair.sparse.model
    masks = sparsity.supports(model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    bridges = torch.optim.AdamW(pair.bridge_set.parameters(), weight_decay=0.0)
    sparse = torch.optim.AdamW(
        named.values(), betas=(0.9, 0.95), eps=config.sparse_eps, weight_decay=config.sparse_weight_decay
    )
    for step, batch in enumerate(batches, 1):
        step_gradients(pair, [batch], range(len(pair.bridge_set)), Objective(Weights(), train_sparse=True))
        for name, p in named.items():
            if name in masks:
                p.grad = torch.where(masks[name], p.grad, 0)
        kept = [p.grad[masks[name]] if name in masks else p.grad.flatten() for name, p in named.items()]
        rms = torch.cat(kept).square().mean().sqrt()
        for p in named.values():
            p.grad *= min(1.0, 1 / rms.item())
        bridges.param_groups[0]["lr"] = config.lr * (1 - (step - 1) / config.steps)
        sparse.param_groups[0]["lr"] = sparsity.learning_rate(step, config.steps, config.sparse_lr)
        for optimizer in (bridges, sparse):
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for name, mask in masks.items():
                named[name].copy_(torch.where(mask, named[name], 0)) if name in named else None


@pytest.mark.parametrize("options", [{}, {"tied_unembed": True}, {"d_pos_emb": 4}], ids=["plain", "tied", "positions"])
def test_steps_on_the_nonzeros_are_those_on_whole_tensors(options):
    batches = [(tokens(seed=seed), MASK) for seed in range(5)]
    found, expected = (join(gpt2(), projected(**options)) for _ in range(2))
    config = FitConfig(**SETTINGS)
    with ProcessGroup() as processes:
        trainer = Trainer(found, config, processes)
        for batch in batches:
            trainer.train_step([batch])
    train_by_hand(expected, batches, config)
    for pair in (found, expected):
        masks = sparsity.supports(pair.sparse.model).values()
        assert sum(int(mask.sum()) for mask in masks) < 0.1 * sum(mask.numel() for mask in masks)
    for one, other in zip(found.sparse.model.parameters(), expected.sparse.model.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-10)
    for one, other in zip(found.bridge_set.parameters(), expected.bridge_set.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("use_kernels", [True, False])
def test_kernels_change_neither_logits_nor_gradients(use_kernels):
    model, ids = projected(), tokens()
    before, masks = copy.deepcopy(model), sparsity.supports(model)
    support = Support(model, masks, use_kernels)
    with support.sparse_kernels():
        logits = model(ids).logits
    assert torch.allclose(logits, before(ids).logits, atol=1e-12)
    logits.square().sum().backward()
    support.gather_gradients()
    before(ids).logits.square().sum().backward()
    values = support.parameters()[: len(masks)]  # of the sparse tensors, all of which train
    for vector, (name, other) in zip(values, sparsity.sparse_parameters(before), strict=True):
        expected = torch.zeros_like(other) if other.grad is None else other.grad
        assert torch.allclose(vector.grad, expected[masks[name]], atol=1e-10)


def replaced(model):
    """Names of the modules whose forward is another than their class's."""
    return {name for name, module in model.named_modules() if "forward" in vars(module)}


def test_kernels_serve_matrices_of_low_density_alone():
    model = projected(0.08)
    with torch.no_grad():
        model.blocks[0].mlp.c_fc.weight.fill_(1)
    with Support(model, sparsity.supports(model)).sparse_kernels():
        assert {"lm_head", "transformer.h.1.mlp.c_fc"} <= replaced(model)
        assert "transformer.h.0.mlp.c_fc" not in replaced(model)
    with Support(model, sparsity.supports(model), use_kernels=False).sparse_kernels():
        assert not replaced(model)


def test_a_frozen_model_gives_the_same_logits_and_gradients_by_its_nonzeros():
    model, ids = projected(), tokens()
    plain = model(ids).logits.detach()
    with use_sparse_kernels(model):
        assert {"lm_head", "transformer.h.0.attn.c_attn"} <= replaced(model)
        logits = model(ids).logits
        embedded = torch.autograd.grad(logits.square().sum(), model.transformer.wte.weight)[0]
    assert not replaced(model)
    assert torch.allclose(logits, plain, atol=1e-12)
    expected = torch.autograd.grad(model(ids).logits.square().sum(), model.transformer.wte.weight)[0]
    assert torch.allclose(embedded, expected, atol=1e-10)


def test_frozen_parameters_are_not_trained():
    model = projected()
    model.lm_head.weight.requires_grad_(False)
    support = Support(model, sparsity.supports(model))
    with support.sparse_kernels():
        assert "lm_head" not in replaced(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    count = sum(int((p != 0).sum()) if name in support.masks else p.numel() for name, p in trained)
    assert sum(p.numel() for p in support.parameters()) == count


def test_masks_of_other_tensors_are_refused():
    masks = sparsity.supports(projected())
    masks.pop("lm_head.weight")
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        Support(projected(), masks)


@pytest.mark.parametrize("options", [{}, {"tied_unembed": True}], ids=["plain", "tied"])
def test_skipping_zeros_changes_neither_logits_nor_the_gradients_of_any_entry(options, monkeypatch):
    model, ids = sparse_model(width=40, **options), tokens()
    sparsity.project(model, 0.05, 0)
    calls = []
    product = sparse_linear_module._product
    monkeypatch.setattr(sparse_linear_module, "_product", lambda *args: calls.append(1) or product(*args))

    def outcome():
        logits = model(ids).logits
        logits.square().sum().backward()
        return [logits, *gradients(model.parameters())]

    plain = outcome()
    assert not calls
    with skip_zeros(model):
        by_nonzeros = outcome()
    assert len(calls) >= 2 * 3  # of two layers, at least c_attn, c_fc and a c_proj
    for one, other in zip(by_nonzeros, plain, strict=True):
        assert relative(one, other) < 1e-10
    entries = model.transformer.h[0].mlp.c_fc.weight.numel()
    assert any(one.count_nonzero() > 0.5 * entries for one in by_nonzeros if one.numel() == entries)
