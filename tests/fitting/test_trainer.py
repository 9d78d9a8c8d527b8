import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count, pairwise

import pytest
import torch
from pairs import MASK, gpt2, gradients, join, naive_objective, sparse_model, tokens

from bridges.config import FitConfig
from bridges.fitting.checkpoint import last_checkpoint
from bridges.fitting.gradients import StepLosses, Weights, trained_parameters
from bridges.fitting.guards import refuse_not_finite
from bridges.fitting.processes import ProcessGroup
from bridges.fitting.start import StartState, start_from_checkpoint
from bridges.fitting.tracking import Tracker
from bridges.fitting.trainer import Trainer, checkpoint_saver, train
from bridges.sparsity import projection as sparsity

BATCH = (tokens(), MASK)
JOINT = {"train_sparse": True, "target_density": 0.5}


def trainer(pair=None, start=None, **settings):
    pair = pair or join(gpt2(layers=1), sparse_model(layers=1))
    config = FitConfig(**{"steps": 4, "sites_per_step": "all", "lr": 1e-2, **settings})
    return Trainer(pair, config, ProcessGroup(), start)


def tensors(found):
    sparse = found.pair.sparse.model.parameters()
    return [t.detach().clone() for t in (*found.pair.bridge_set.parameters(), *sparse)]


@pytest.mark.parametrize("joint", [False, True])
def test_the_gradient_of_a_whole_step_is_plain_autograd_of_the_naive_objective(joint, monkeypatch):
    monkeypatch.setattr(sparsity, "clip_to_rms", lambda parameters: None)
    pair = join(gpt2(), sparse_model())
    weights = {"nmse_weight": 0.7, "kl_dense_to_sparse_weight": 1.3, "kl_sparse_to_dense_weight": 0.6, "ce_weight": 0.9}
    loss, ce = naive_objective(pair, Weights(*weights.values()), *BATCH)
    loss = loss + 0.9 * ce if joint else loss
    for parameter in pair.sparse.model.parameters():
        parameter.grad = None
    loss.backward()
    expected = gradients(trained_parameters(pair, joint))
    for parameter in pair.sparse.model.parameters():
        parameter.grad = None

    whole = {"target_density": 1.0} if joint else {}  # every entry trains, so gradients stay on the whole tensors
    found = trainer(pair, train_sparse=joint, **whole, **weights)
    losses = found.train_step([BATCH])
    assert abs(losses.loss / loss.item() - 1) < 1e-12
    largest = max(g.abs().max() for g in expected)
    for one, other in zip(gradients(trained_parameters(pair, joint)), expected, strict=True):
        assert (one - other).abs().max() <= 1e-10 * max(other.abs().max(), 1e-4 * largest)


def adamw(parameter, grads, rates, betas, eps, decay):
    """AdamW as its paper writes it."""
    m = v = 0.0
    for t, (g, lr) in enumerate(zip(grads, rates, strict=True), start=1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        step = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        parameter = parameter * (1 - lr * decay) - lr * step
    return parameter


def test_bridges_take_adamw_steps_without_decay_at_a_rate_that_falls_linearly():
    found, grads = trainer(), []
    bias = found.pair.bridge_set[1].decoder_bias
    before = bias.detach().clone()
    for _ in range(3):
        found.train_step([BATCH])
        grads.append(bias.grad.clone())
    expected = adamw(before, grads, [0.01, 0.0075, 0.005], (0.9, 0.999), 1e-8, 0.0)
    torch.testing.assert_close(bias.detach(), expected, rtol=1e-12, atol=0)


def test_the_sparse_model_takes_clipped_adamw_steps_at_its_own_rate():
    """The first of two steps is the peak of the schedule: sparse_lr sqrt(target / kept), 0.75 of the weights kept."""
    pair = join(gpt2(layers=1), sparse_model(layers=1))
    found = trainer(pair, steps=2, anneal=1.0, sparse_lr=0.02, sparse_weight_decay=0.3, sparse_eps=1e-3, **JOINT)
    gain = pair.sparse.model.transformer.ln_f.weight  # dense, so never projected
    before = gain.detach().clone()
    found.train_step([BATCH])
    grads = [p.grad for p in pair.sparse.model.parameters() if p.grad is not None]
    rms = (sum(g.square().sum() for g in grads) / sum(g.numel() for g in grads)).sqrt()
    assert rms <= 1 + 1e-12
    rate = 0.02 * (0.5 / 0.75) ** 0.5
    expected = adamw(before, [gain.grad], [rate], (0.9, 0.95), 1e-3, 0.3)
    torch.testing.assert_close(gain.detach(), expected, rtol=1e-12, atol=0)
    assert found.sparse.kept_fraction(1) == 0.75 and found.sparse.kept_fraction(2) == 0.5
    embedding = pair.sparse.model.transformer.wte.weight
    assert int(torch.count_nonzero(embedding)) == round(0.75 * embedding.numel())


def test_sampled_sites_follow_the_seed_and_the_step_alone():
    one, two = trainer(sites_per_step=2), trainer(sites_per_step=2)
    drawn = [one.sampled_sites(step) for step in range(1, 31)]
    assert [two.sampled_sites(step) for step in range(30, 0, -1)] == drawn[::-1]
    assert {tuple(sites) for sites in drawn} == {(0, 1), (0, 2), (1, 2)}
    assert drawn != [trainer(sites_per_step=2, seed=1).sampled_sites(step) for step in range(1, 31)]
    assert trainer(sites_per_step=9).sampled_sites(1) == trainer().sampled_sites(1) == [0, 1, 2]


def test_the_sampled_path_follows_the_seed_and_the_step_alone():
    assert trainer().sampled_path(1) is None
    one, two = trainer(path_weight=0.5), trainer(path_weight=0.5)
    drawn = [one.sampled_path(step) for step in range(1, 41)]
    assert [two.sampled_path(step) for step in range(40, 0, -1)] == drawn[::-1]
    changes = {sum(a != b for a, b in pairwise(path)) for path in drawn}
    assert changes == {2, 3} and {path[0] for path in drawn} == {"dense", "sparse"}
    assert "train/kl_path" in one.train_step([BATCH]).row()


MOVING = {**JOINT, "support": "moving", "start_density": 0.6, "move_every": 2, "move_share": 0.3}


@pytest.mark.parametrize(
    "settings", [{}, JOINT, {"train_sparse": True}, MOVING], ids=["frozen", "joint", "kept zeros", "moving"]
)
def test_a_trainer_built_from_a_checkpoint_goes_on_as_if_never_stopped(tmp_path, settings):
    def pair():
        sparse = sparse_model(layers=1, dropout=0.2).train(bool(settings))
        sparsity.project(sparse, 0.6)
        return join(gpt2(layers=1), sparse)

    whole = trainer(pair(), **settings)
    for _ in range(4):
        whole.train_step([BATCH])
    first = trainer(pair(), **settings)
    for _ in range(2):
        first.train_step([BATCH])
    checkpoint_saver(first, tmp_path, {"data": "d"})()
    torch.manual_seed(1234)  # whatever the process drew before
    restored = pair()
    second = trainer(restored, start_from_checkpoint(restored, last_checkpoint(tmp_path)), **settings)
    for _ in range(2):
        second.train_step([BATCH])
    assert second.step == 4
    assert all(torch.equal(one, two) for one, two in zip(tensors(second), tensors(whole), strict=True))


def test_a_moving_support_falls_to_its_density_moves_and_trains_nothing_else():
    sparse = sparse_model(layers=1)
    sparsity.project(sparse, 0.6, 1)
    pair = join(gpt2(layers=1), sparse)
    found = trainer(pair, steps=8, anneal=0.5, **{**MOVING, "target_density": 0.25})
    weights = dict(sparsity.sparse_parameters(pair.sparse.model))
    before = found.sparse.support.masks
    counts = []
    for _ in range(8):
        masks = found.sparse.support.masks
        found.train_step([BATCH])
        assert all(
            (weight == 0)[~(masks[name] | found.sparse.support.masks[name])].all() for name, weight in weights.items()
        )
        counts.append(int(found.sparse.support.masks["transformer.wte.weight"].sum()))
    size = weights["transformer.wte.weight"].numel()
    assert counts == [round(kept * size) for kept in (0.6, 0.425, 0.425, 0.25, 0.25, 0.25, 0.25, 0.25)]
    grown = [name for name, mask in found.sparse.support.masks.items() if (mask & ~before[name]).any()]
    assert "transformer.h.0.mlp.c_fc.weight" in grown


def test_a_support_that_moves_nothing_is_the_fixed_one():
    def pair():
        sparse = sparse_model(layers=1)
        sparsity.project(sparse, 0.6, 1)
        return join(gpt2(layers=1), sparse)

    # A moving run's peak rate is that of its own schedule, with as many weights kept as at the end.
    still = trainer(pair(), **{**MOVING, "target_density": 0.6, "move_share": 0.0})
    fixed = trainer(pair(), train_sparse=True)
    for _ in range(4):
        still.train_step([BATCH])
        fixed.train_step([BATCH])
    for one, two in zip(tensors(still), tensors(fixed), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


def test_without_a_folder_no_checkpoint_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint_saver(trainer(), None, {})()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["nmse_encode", "nmse_decode", "kl_dense_to_sparse", "kl_sparse_to_dense"])
def test_a_loss_that_is_not_finite_is_named_with_its_step_and_site(name):
    losses = StepLosses(**{name: {"0.attn": 1.0, "1.mlp": float("inf")}})
    with pytest.raises(FloatingPointError, match=rf"step 9: {name} at site 1\.mlp is inf"):
        refuse_not_finite(losses, 9)


def test_a_cross_entropy_that_is_not_finite_is_named():
    with pytest.raises(FloatingPointError, match=r"step 9: the sparse model's cross-entropy is nan"):
        refuse_not_finite(StepLosses(ce=float("nan")), 9)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_refused_changes_nothing(where):
    found = trainer(**JOINT)
    if where == "loss":
        found.pair.bridge_set[1].encoder_bias.data[2] = float("nan")
    else:
        found.pair.bridge_set[1].decoder_bias.register_hook(lambda grad: grad * float("inf"))
    before = tensors(found)
    message = r"nmse_encode at site 0\.mlp is nan" if where == "loss" else "a gradient is not finite"
    with pytest.raises(FloatingPointError, match=f"step 1: {message}"):
        found.train_step([BATCH])
    assert found.step == 0
    for one, two in zip(tensors(found), before, strict=True):
        assert torch.equal(one.nan_to_num(), two.nan_to_num())


def loop(found, tracker=None, folder=None, hook=lambda step: None):
    """`train` with what it calls written down: the steps asked for and the steps saved."""
    asked, saved = [], []

    def batches(step):
        asked.append(step)
        hook(step)
        return [BATCH]

    save = checkpoint_saver(found, folder, {})
    try:
        train(found, batches, tracker, lambda: (saved.append(found.step), save()), lambda: None)
    finally:
        found.asked, found.saved = asked, saved
    return found


def test_the_loop_takes_batches_saves_and_logs_at_its_steps():
    tracker = Tracker(None, "none", {}, 0)
    found = loop(trainer(steps=5, checkpoint_every=2), tracker)
    assert (found.asked, found.saved) == ([1, 2, 3, 4, 5], [2, 4, 5])
    assert [row["step"] for row in tracker.rows] == [1, 2, 3, 4, 5]
    assert [row["lr"] for row in tracker.rows] == pytest.approx([0.01, 0.008, 0.006, 0.004, 0.002])
    assert all(row["tokens_per_second"] > 0 and "kept_fraction" not in row for row in tracker.rows)


def test_a_loop_whose_steps_are_done_does_nothing():
    found = trainer(start=StartState(step=2), steps=2)
    assert loop(found).asked == [] and found.saved == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_loop_after_the_current_step_with_a_checkpoint(number):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    found = trainer(checkpoint_every=100)
    with pytest.raises(KeyboardInterrupt):
        loop(found, hook=lambda step: os.kill(os.getpid(), number) if step == 2 else None)
    assert (found.asked, found.saved) == ([1, 2], [2])
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_stop_on_another_process_stops_this_one_at_the_same_step(monkeypatch):
    """The sum over processes is what counts: here the other one's Ctrl-C comes in the third step."""
    found, calls = trainer(checkpoint_every=100), count(1)

    def all_reduce(tensor):
        return tensor + 1 if tensor.numel() == 1 and next(calls) == 3 else tensor

    monkeypatch.setattr(found.processes, "all_reduce", all_reduce)
    with pytest.raises(KeyboardInterrupt):
        loop(found)
    assert (found.asked, found.saved) == ([1, 2, 3], [3])


def test_the_loop_leaves_the_generators_of_the_cpu_and_of_all_cuda_devices(cuda_generators):
    found = trainer(steps=2)
    before, cuda_before = torch.get_rng_state(), dict(cuda_generators)
    assert loop(found).step == 2 and torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(cuda_generators[device], state) for device, state in cuda_before.items())


def in_threads(*calls):
    """The results, or exceptions, of calls that run at the same time; those that hang fail."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        return [future.exception(timeout=60) or future.result() for future in futures]


def two_processes():
    """Two groups that stand for two processes: `all_reduce` waits for the other thread and adds its tensor."""
    barrier, tensors = threading.Barrier(2, timeout=30), [None, None]

    def group(rank):
        found = ProcessGroup()
        found.rank, found.world_size, found.is_main = rank, 2, rank == 0

        def all_reduce(tensor):
            tensors[rank] = tensor
            barrier.wait()
            total = tensors[0] + tensors[1]
            barrier.wait()
            return total

        found.all_reduce = all_reduce
        return found

    return group(0), group(1)


@pytest.mark.parametrize(("one", "two"), [("train heldout", "train HELDOUT"), ("a", "b"), ("a", "")])
def test_processes_that_differ_in_any_part_are_all_refused_and_none_waits(one, two):
    groups = two_processes()
    found = in_threads(*(partial(g.refuse_unequal, "data", text) for g, text in zip(groups, (one, two), strict=True)))
    assert [type(error) for error in found] == [ValueError, ValueError]
    assert "data differs between processes" in str(found[0])
    assert in_threads(*(partial(group.refuse_unequal, "data", one) for group in groups)) == [None, None]


def test_the_main_processs_values_are_broadcast():
    groups, tensors = two_processes(), (torch.tensor([1.0, 2.0]), torch.tensor([5.0, 7.0]))
    in_threads(*(partial(group.broadcast, [tensor]) for group, tensor in zip(groups, tensors, strict=True)))
    assert tensors[1].tolist() == tensors[0].tolist() == [1.0, 2.0]


def test_process_groups_of_different_precisions_may_follow_one_another():
    for precision in ("no", "bf16", "no"):
        processes = ProcessGroup(precision)
        with processes.autocast():
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
        assert (processes.world_size, processes.rank, processes.is_main) == (1, 0, True)
