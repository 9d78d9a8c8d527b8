"""On a GPU: the figures of the CPU, and no wait for the device inside a step. Skipped where there is none."""

from contextlib import contextmanager

import pytest
import torch
from pairs import MASK, gpt2, join, sparse_model, tokens, toy_task
from planted import PATH, planted_model, planted_pairs, planted_text

import bridges
from bridges.config import FitConfig
from bridges.fitting import gradients
from bridges.fitting import trainer as trainer_module
from bridges.fitting.processes import ProcessGroup
from bridges.fitting.trainer import Trainer
from bridges.models.loading import as_residual
from bridges.ops import compiled
from bridges.ops.abs_topk import _BITS, abs_topk, abs_topk_eager
from bridges.ops.kl import kl_divergence, kl_divergence_eager, row_divergence
from bridges.sparsity.pretraining import Pretrainer, prune_to_start
from bridges.sparsity.projection import largest
from bridges.sparsity.settings import PretrainConfig

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; the same code runs on CPUs in other tests"),
]


@pytest.fixture(autouse=True)
def exact_products():
    """Float32 products in float32, whatever a test before has set."""
    torch.set_float32_matmul_precision("highest")


@contextmanager
def refuses_waiting(wanted):
    """An error at whatever makes the host wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error" if wanted else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", list(_BITS))
@pytest.mark.parametrize(("d", "k"), [(7, 3), (64, 63), (2048, 512), (2049, 1), (16384, 4000), (20000, 17)])
def test_abs_topk_and_its_gradient_are_those_of_the_cpu(dtype, d, k):
    x = torch.randn(40, d, generator=torch.Generator().manual_seed(d)).to(dtype)
    x[1], x[2] = x[1].round(), 0.0
    x[3, 0], x[3, 1], x[4] = float("nan"), float("inf"), -0.0
    upstream = torch.randn(40, d, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for device, function in ((DEVICE, abs_topk), ("cpu", abs_topk_eager)):
        one = x.to(device, copy=True).requires_grad_()
        kept = function(one, k)
        kept.backward(upstream.to(device))
        results.append((kept.detach().cpu(), one.grad.cpu()))
    for on_gpu, on_cpu in zip(*results, strict=True):
        assert torch.equal(on_gpu.nan_to_num(nan=7.0), on_cpu.nan_to_num(nan=7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "fewest"), [(None, 0), (0, 4), (1, 2)])
def test_a_whole_weight_is_projected_as_on_the_cpu_and_nothing_waits(dtype, dim, fewest):
    """Longer than one program holds; most entries are zero, or tie, in half precision."""
    weight = torch.randn(1100, 2048, generator=torch.Generator().manual_seed(3)).to(dtype)
    weight[weight.abs() < 1] = 0
    on_gpu = weight.to(DEVICE)
    for count in (1, 50_000, weight.numel() - 3):
        largest(on_gpu, count, dim, fewest)  # compiles
        with refuses_waiting(True):
            found = largest(on_gpu, count, dim, fewest)
        assert torch.equal(found.cpu(), largest(weight, count, dim, fewest))


@pytest.mark.skipif(not compiled._HAS_TRITON, reason="no triton, or torch under 2.8: eager code runs there")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_divergence_of_rows_and_its_gradient_in_one_kernel(dtype):
    from bridges.ops.triton_kl import kl_and_gradient

    target, logits = (torch.randn(300, 50257, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    target, logits = target.to(dtype), logits.to(dtype)
    exact, expected = row_divergence(target.double(), logits.double()), logits.double().softmax(-1)
    expected -= target.double().softmax(-1)
    on_gpu = logits.to(DEVICE)
    kl, normalizer = kl_and_gradient(target.to(DEVICE), on_gpu, on_gpu)
    torch.testing.assert_close(kl.cpu().double(), exact.kl, rtol=1e-5, atol=0)
    torch.testing.assert_close(normalizer.cpu().double(), exact.log_normalizer, rtol=1e-5, atol=0)
    torch.testing.assert_close(on_gpu.cpu().double(), expected, rtol=max(1e-4, torch.finfo(dtype).eps), atol=1e-7)


def test_kl_is_that_of_the_cpu():
    target, logits = (torch.randn(300, 5000, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    on_gpu, on_cpu = logits.to(DEVICE, copy=True).requires_grad_(), logits.double().requires_grad_()
    value = kl_divergence(target.to(DEVICE), on_gpu)
    expected = kl_divergence_eager(target.double(), on_cpu)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value.cpu().double(), expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(on_gpu.grad.cpu().double(), on_cpu.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("support", ["moving", "projected"])
def test_a_pretraining_step_waits_for_nothing_and_is_that_of_the_cpu(support):
    """Taught by a sparse model: what transformers' models do with their masks waits for the GPU outside a graph."""
    config = PretrainConfig(steps=4, start_density=0.5, target_density=0.2, move_every=3, lr=0.02, support=support)
    trained = []
    for device in ("cpu", DEVICE):
        model, teacher = sparse_model().to(device), as_residual(sparse_model(seed=9).to(device))
        trainer = Pretrainer(model, teacher, config, prune_to_start(model, config))
        losses = []
        for step in range(4):
            with refuses_waiting(device == "cuda" and step > 0 and not trainer.moves(step + 1)):
                losses.append(trainer.train_step([(tokens(seed=step), None)]))
        trained.append((model.cpu(), losses))
    assert_trained_alike(*trained)


@pytest.mark.parametrize("settings", [{}, {"train_sparse": True}, {"train_sparse": True, "target_density": 0.5}])
@pytest.mark.parametrize("mask", [None, MASK])
def test_a_step_of_fit_waits_for_its_figures_alone_and_is_that_of_the_cpu(settings, mask, monkeypatch):
    """Between two sparse models, as above."""

    def step_losses(*args):
        with refuses_waiting(False):
            losses = gradients.step_losses(*args)
        reads.append(losses)
        torch.cuda.set_sync_debug_mode("error")
        return losses

    trained, reads = [], []
    config = FitConfig(steps=4, sites_per_step=2, lr=1e-3, **settings)
    for device in ("cpu", DEVICE):
        pair = join(sparse_model(width=8, seed=9).to(device), sparse_model().to(device))
        pair.bridge_set.to(device)
        trainer = Trainer(pair, config, ProcessGroup())
        losses = [trainer.train_step([(tokens(), mask)])]
        with monkeypatch.context() as patch, refuses_waiting(device == DEVICE):
            if device == DEVICE:
                patch.setattr(trainer_module, "step_losses", step_losses)
            losses += [trainer.train_step([(tokens(seed=step), mask)]) for step in range(2)]
        trained.append(
            (losses, [p.detach().cpu() for p in (*pair.bridge_set.parameters(), *pair.sparse.model.parameters())])
        )
    assert len(reads) == 2
    for one, two in zip(trained[0][0], trained[1][0], strict=True):
        assert two.row() == pytest.approx(one.row(), rel=1e-9)
    for one, two in zip(trained[0][1], trained[1][1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("support", ["moving", "projected"])
def test_steps_by_a_cuda_graph_are_those_without_one(support):
    settings = {"steps": 20, "start_density": 0.5, "target_density": 0.2, "move_every": 3, "lr": 0.02}
    trained = []
    for graph in (False, True):
        config = PretrainConfig(**settings, support=support, cuda_graph=graph)
        model, teacher = sparse_model().to(DEVICE), as_residual(gpt2().to(DEVICE))
        trainer = Pretrainer(model, teacher, config, prune_to_start(model, config))
        losses = [trainer.train_step([(tokens(seed=step), None)]) for step in range(20)]
        assert (trainer._graph is not None) == graph
        trained.append((model.cpu(), losses))
    assert_trained_alike(*trained, rtol=1e-6)  # a graph's learning rate is in float32


def assert_trained_alike(one, other, rtol=1e-9):
    (model, losses), (other_model, other_losses) = one, other
    for x, y in zip(losses, other_losses, strict=True):
        torch.testing.assert_close(torch.stack([*x]).cpu(), torch.stack([*y]).cpu(), rtol=rtol, atol=1e-12)
    for (name, p), q in zip(model.named_parameters(), other_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=100 * rtol, atol=rtol, msg=name)


def test_fit_evaluate_and_steer_give_the_figures_of_the_cpu():
    settings = {"steps": 3, "batch_size": 4, "closed_form_tokens": 100, "lr": 1e-3, "progress": False}
    rows, figures = tokens(12, 8, seed=21), []
    for device in ("cpu", DEVICE):
        dense, sparse = gpt2().to(device), sparse_model().to(device)
        bridge_set = bridges.fit(dense, sparse, rows, **settings)
        edit = bridges.Edit("1.attn", 0, 2.0)
        with bridges.steer(dense, bridge_set, edit, sparse=sparse, strength=2.0) as steered, torch.no_grad():
            logits = steered(rows.to(device)).logits.cpu()
        report = torch.tensor(list(bridge_set.report.flat().values()), dtype=torch.float64)
        figures.append((report.nan_to_num(nan=-1), logits))
    for on_cpu, on_gpu in zip(*figures, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-6, atol=1e-8)


def test_channels_found_are_those_of_the_cpu():
    rows, found = tokens(12, 8, seed=21), []
    for device in ("cpu", DEVICE):
        dense, sparse = gpt2().to(device), sparse_model().to(device)
        bridge_set = bridges.fit(dense, sparse, rows, steps=0, closed_form_tokens=100, progress=False)
        one = bridges.find_channels(dense, sparse, bridge_set, toy_task(), budget=9.0, text=rows, progress=False)
        found.append((one.best.site, one.best.channels, one.best.at))
    assert found[0] == found[1]


def test_a_planted_circuit_is_found_on_a_gpu():
    model = planted_model().to(DEVICE)
    circuit = bridges.prune(model, planted_pairs(), text=planted_text(), steps=60, target_loss=0.01, progress=False)
    assert {f"{place}.{index}" for place, indices in circuit.nodes.items() for index in indices} == set(PATH)
