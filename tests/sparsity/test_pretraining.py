"""The steps of pretraining against the same training written out on whole tensors, in float64."""

import copy
import math

import pytest
import torch
from pairs import MASK, gpt2, sparse_model, tokens

from bridges.models.loading import as_residual
from bridges.models.sparse.config import SparseConfig
from bridges.models.sparse.model import SparseTransformer
from bridges.sparsity import pretraining, projection
from bridges.sparsity.moving import moved_mask, moving_share
from bridges.sparsity.pretraining import Pretrainer, Processes, prune_to_start
from bridges.sparsity.settings import PretrainConfig

SETTINGS = {
    "steps": 12,
    "start_density": 0.5,
    "target_density": 0.2,
    "anneal": 0.5,
    "move_every": 3,
    "move_by": "magnitude",
    "move_share": 0.3,
    "lr": 0.02,
    "weight_decay": 0.3,
    "ce_weight": 0.7,
    "kl_weight": 1.3,
}
BATCHES = [[(tokens(seed=seed), MASK), (tokens(seed=seed + 50), None)] for seed in range(12)]
"""Two micro-batches in every step, one of them padded."""


def loss_by_hand(model, teacher, batches, config):
    """The two means over all tokens of all micro-batches, each token by itself."""
    ce, kl = [], []
    for ids, mask in batches:
        mask = torch.ones_like(ids) if mask is None else mask
        logits = model(ids, attention_mask=mask).logits
        with torch.no_grad():
            target = teacher.residuals(ids, mask)[1].log_softmax(-1)
        for row in range(len(ids)):
            for place in range(ids.shape[1]):
                log_q = logits[row, place].log_softmax(-1)
                if mask[row, place]:
                    kl.append((target[row, place].exp() * (target[row, place] - log_q)).sum())
                    if place + 1 < ids.shape[1] and mask[row, place + 1]:
                        ce.append(-log_q[ids[row, place + 1]])
    ce, kl = torch.stack(ce).mean(), torch.stack(kl).mean()
    return config.ce_weight * ce + config.kl_weight * kl, ce, kl


class WholeTensors:
    """AdamW on whole tensors with gradients and moments kept inside the masks, by its formula."""

    def __init__(self, model, config):
        self.model, self.config = model, config
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masks = projection.supports(model)
        self.first = {name: torch.zeros_like(p) for name, p in self.named.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.named.items()}

    @torch.no_grad()
    def step(self, t, lr, gradients):
        inside = {n: g * self.masks[n] if n in self.masks else g for n, g in gradients.items()}
        counted = [g[self.masks[n]] if n in self.masks else g.flatten() for n, g in inside.items()]
        rms = torch.cat(counted).square().mean().sqrt().item()
        for name, p in self.named.items():
            g = inside[name] * min(1.0, 1 / rms)
            self.first[name] = 0.9 * self.first[name] + 0.1 * g
            self.second[name] = 0.95 * self.second[name] + 0.05 * g * g
            if p.ndim == 2 and name in self.masks:
                p.mul_(1 - lr * self.config.weight_decay)
            moved = self.first[name] / (1 - 0.9**t) / ((self.second[name] / (1 - 0.95**t)).sqrt() + self.config.eps)
            p.sub_(lr * moved * self.masks[name] if name in self.masks else lr * moved)

    @torch.no_grad()
    def move(self, kept, share, gradients):
        for name, p in self.named.items():
            if name in self.masks:
                count, dim = max(1, round(kept * p.numel())), projection.channel_dim(name)
                before = self.masks[name]
                after = moved_mask(p, before, gradients[name], count, round(share * count), dim, 1)
                for tensor in (p, self.first[name], self.second[name]):
                    tensor.mul_(after & before)
                self.masks[name] = after


def test_steps_with_a_moving_support_are_those_on_whole_tensors_with_masks():
    config = PretrainConfig(**SETTINGS)
    model, expected = sparse_model(enable_bigram_table=False, learnable_bigram_table=False), None
    expected = sparse_model(enable_bigram_table=False, learnable_bigram_table=False)
    teacher = as_residual(gpt2())
    densities = prune_to_start(model, config)
    prune_to_start(expected, config)
    trainer, by_hand = Pretrainer(model, teacher, config, densities), WholeTensors(expected, config)
    moved = 0
    for t, batches in enumerate(BATCHES, 1):
        found = trainer.train_step(batches)
        loss, ce, kl = loss_by_hand(expected, teacher, batches, config)
        assert found.ce.item() == pytest.approx(ce.item(), rel=1e-9)
        assert found.kl.item() == pytest.approx(kl.item(), rel=1e-9)
        kept = 0.2 if t >= 6 else 0.5 * 0.4 ** (t / 6)
        lr = projection.learning_rate(t, 12, 0.02, config.warmup, kept, 0.2)
        named = by_hand.named
        gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        by_hand.step(t, lr, gradients)
        if t in (3, 6, 9):
            by_hand.move(kept, moving_share(t, 12, 0.3, 0.85), gradients)
            moved += 1
        for (name, one), (_, other) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10, msg=f"step {t}, {name}")
    assert moved == 3
    # One weight for each of 12 + 8 + 16 channels may be more than the share of a tensor.
    assert projection.density(model) == pytest.approx(0.2, abs=0.02)


def test_projected_training_is_adamw_and_then_the_paper_s_projection():
    settings = {**SETTINGS, "support": "projected", "schedule": "linear", "start_density": 1.0, "min_per_channel": 2}
    config = PretrainConfig(**settings)
    model, expected = sparse_model(), sparse_model()
    teacher = as_residual(gpt2())
    trainer = Pretrainer(model, teacher, config, prune_to_start(model, config))
    matrices = [p for p in expected.parameters() if p.requires_grad and p.ndim == 2]
    rest = [p for p in expected.parameters() if p.requires_grad and p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=config.eps)
    for t, batches in enumerate(BATCHES, 1):
        trainer.train_step(batches)
        kept = projection.kept_fraction(t, 12, 0.2, 0.5, 1.0)
        optimizer.zero_grad()
        loss_by_hand(expected, teacher, batches, config)[0].backward()
        projection.clip_to_rms([*matrices, *rest])
        for group in optimizer.param_groups:
            group["lr"] = projection.learning_rate(t, 12, 0.02, config.warmup, kept, 0.2)
        optimizer.step()
        projection.project(expected, kept, 2)
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_at_a_density_of_one_a_new_model_trains_whole_its_zero_biases_included():
    """The settings of configs/dense_twin.toml: AdamW on every weight, and nothing is pruned."""
    own = {"support": "projected", "start_density": 1.0, "target_density": 1.0}
    config = PretrainConfig(**{**SETTINGS, **own})
    torch.manual_seed(0)
    model = SparseTransformer(SparseConfig(vocab_size=17, n_layer=1, d_model=12, d_head=4, block_size=12)).double()
    expected = copy.deepcopy(model)
    assert projection.density(model) < 1
    trainer = Pretrainer(model, None, config, prune_to_start(model, config))
    matrices = [p for p in expected.parameters() if p.requires_grad and p.ndim == 2]
    rest = [p for p in expected.parameters() if p.requires_grad and p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=config.eps)
    for t in range(1, 4):
        ids = tokens(seed=t)
        trainer.train_step([(ids, None)])
        optimizer.zero_grad()
        logits = expected(ids).logits[:, :-1].flatten(0, 1)
        (0.7 * torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())).backward()
        projection.clip_to_rms([*matrices, *rest])
        for group in optimizer.param_groups:
            group["lr"] = projection.learning_rate(t, 12, 0.02, config.warmup)
        optimizer.step()
    for (name, one), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10, msg=name)
    assert model.blocks[0].mlp.c_fc.bias.any() and model.blocks[0].attn.c_proj.bias.any()


def test_a_fixed_support_keeps_its_zeros_and_moves_never():
    config = PretrainConfig(steps=6, support="fixed", lr=0.05)
    model = sparse_model()
    projection.project(model, 0.3)
    before = projection.supports(model)
    trainer = Pretrainer(model, None, config, prune_to_start(model, config))
    values = model.lm_head.weight.detach().clone()
    for batches in BATCHES[:6]:
        losses = trainer.train_step(batches)
    assert losses.kl == 0
    assert not torch.equal(values, model.lm_head.weight)
    for name, mask in projection.supports(model).items():
        assert torch.equal(mask & before[name], mask), name


def test_the_support_arrives_at_its_target_also_between_two_moves_and_rests_at_the_end():
    config = PretrainConfig(steps=40, start_density=0.5, target_density=0.1, anneal=0.33, move_every=9, move_until=0.6)
    trainer = Pretrainer(sparse_model(), None, config, prune_to_start(sparse_model(), config))
    assert [step for step in range(1, 41) if trainer.moves(step)] == [9, math.ceil(0.33 * 40), 18]
    late = PretrainConfig(steps=40, start_density=0.5, target_density=0.1, anneal=0.9, move_every=10, move_until=0.3)
    trainer = Pretrainer(sparse_model(), None, late, prune_to_start(sparse_model(), late))
    assert [step for step in range(1, 41) if trainer.moves(step)] == [10, 20, 30, 36]


def test_a_model_s_own_density_is_what_a_run_starts_from_and_keeps():
    model = sparse_model()
    projection.project(model, 0.25, min_per_channel=1)
    own = projection.density(model)
    assert prune_to_start(model, PretrainConfig()) == (own, own)
    assert prune_to_start(model, PretrainConfig(target_density=0.1)) == (own, 0.1)
    assert projection.density(model) == own
    prune_to_start(model, PretrainConfig(start_density=0.1))
    assert projection.density(model) < own


def test_a_process_without_rows_adds_zeros_of_the_others_dtype():
    summed = []

    def reduce(tensor):
        summed.append(tensor.clone())
        return tensor

    model, config = sparse_model(layers=1), PretrainConfig(**SETTINGS)
    densities = prune_to_start(model, config)
    trainer = Pretrainer(model, as_residual(gpt2(layers=1)), config, densities, Processes(reduce=reduce))
    with torch.no_grad():
        trainer.losses(BATCHES[0])
        trainer.losses([])
    assert len(summed) == 4 and not summed[2].any() and not summed[3].any()
    for with_rows, without in zip(summed[:2], summed[2:], strict=True):
        assert with_rows.dtype == without.dtype and with_rows.shape == without.shape


class Repeated:
    """In place of a CUDA graph: runs the step on copies of the rows, whenever the graph would be replayed."""

    made = 0

    def __init__(self, step, rows, device):
        Repeated.made += 1
        self._step, self._rows = step, [ids.clone() for ids in rows]

    def __call__(self, rows):
        for own, ids in zip(self._rows, rows, strict=True):
            own.copy_(ids)
        return [result.clone() for result in self._step(self._rows)]


@pytest.mark.parametrize("support", ["moving", "fixed", "projected"])
def test_steps_by_a_graph_are_those_without_one(monkeypatch, support):
    """All but the recording, which needs a GPU (tests/gpu): when a graph is made anew, and what it is given."""
    monkeypatch.setattr(pretraining, "GraphedStep", Repeated)
    monkeypatch.setattr(Repeated, "made", 0)
    settings = {**SETTINGS, "support": support, "steps": 16}
    if support == "fixed":
        settings = {**settings, "start_density": None, "target_density": None}
    trained = []
    for graphed in (False, True):
        model, config = sparse_model(), PretrainConfig(**settings)
        trainer = Pretrainer(model, as_residual(gpt2()), config, prune_to_start(model, config))
        trainer._graphed = graphed
        losses = [trainer.train_step([(tokens(seed=step), None)]) for step in range(16)]
        trained.append((model, losses))
    (model, losses), (by_graph, losses_by_graph) = trained
    assert losses == losses_by_graph
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), by_graph.parameters(), strict=True))
    # Recorded anew at each new density, from step 4 on: a moving support has new ones after steps 6 and 8, and another
    # number of weights moves at none; a projected one has one in each step up to 8.
    assert Repeated.made == {"moving": 3, "fixed": 1, "projected": 5}[support]
