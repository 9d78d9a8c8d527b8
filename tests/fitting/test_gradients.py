import math
from itertools import combinations

import pytest
import torch
from pairs import (
    MASK,
    gpt2,
    gradients,
    join,
    naive_losses,
    naive_nmse,
    naive_objective,
    naive_path_kl,
    neox,
    sparse_model,
    tokens,
)
from torch.autograd.graph import saved_tensors_hooks

from bridges.fit import fit
from bridges.fitting.gradients import Objective, StepLosses, Weights, step_gradients, step_losses, trained_parameters
from bridges.fitting.guards import refuse_not_finite
from bridges.objective import head
from bridges.objective.head import logits_of
from bridges.objective.normalizers import counted_tokens

WEIGHTS = Weights(nmse=0.7, kl_dense_to_sparse=1.3, kl_sparse_to_dense=0.6, ce=0.9)
PAIRS = {
    "equal depth": lambda: join(gpt2(), sparse_model()),
    "deeper dense, concatenated positions": lambda: join(gpt2(layers=3), sparse_model(d_pos_emb=4)),
    "block": lambda: join(neox(), sparse_model()),
}


def stepped(pair, batches, sampled, objective, path=None):
    losses = step_losses(pair, step_gradients(pair, batches, sampled, objective, path), sampled, objective, path)
    return losses, gradients(trained_parameters(pair, objective.train_sparse))


def naive_gradients(pair, weights, ids, mask, train_sparse, sampled=None):
    for parameter in pair.sparse.model.parameters():
        parameter.grad = None
    loss, ce = naive_objective(pair, weights, ids, mask, sampled)
    loss = loss + weights.ce * ce if train_sparse else loss
    loss.backward()
    return loss, gradients(trained_parameters(pair, train_sparse))


def assert_same(found, expected, tolerance=1e-10):
    """Relative to each tensor's largest entry; a tensor of zeros (a sink whose gradient cancels) to rounding."""
    largest = max(g.abs().max() for g in expected)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= tolerance * max(other.abs().max(), 1e-4 * largest)


@pytest.mark.parametrize("train_sparse", [False, True])
@pytest.mark.parametrize("build", PAIRS.values(), ids=PAIRS)
def test_a_steps_gradients_are_plain_autograd_of_the_naive_objective(build, train_sparse):
    pair, ids = build(), tokens()
    everywhere = range(len(pair.bridge_set))
    losses, found = stepped(pair, [(ids, MASK)], everywhere, Objective(WEIGHTS, train_sparse))
    loss, expected = naive_gradients(pair, WEIGHTS, ids, MASK, train_sparse)
    assert abs(losses.loss / loss.item() - 1) < 1e-12
    assert_same(found, expected)


@pytest.mark.parametrize("train_sparse", [False, True])
def test_kls_run_at_the_sampled_sites_and_nmse_at_every_site(train_sparse):
    pair, ids = PAIRS["equal depth"](), tokens()
    losses, found = stepped(pair, [(ids, MASK)], [1, 4], Objective(WEIGHTS, train_sparse))
    loss, expected = naive_gradients(pair, WEIGHTS, ids, MASK, train_sparse, sampled=[1, 4])
    assert abs(losses.loss / loss.item() - 1) < 1e-12
    assert list(losses.kl_dense_to_sparse) == ["0.mlp", "final"] and len(losses.nmse_decode) == 5
    assert_same(found, expected)


@pytest.mark.parametrize("n_tokens", [1, 4, 7])
@pytest.mark.parametrize("train_sparse", [False, True])
@pytest.mark.parametrize("build", PAIRS.values(), ids=PAIRS)
def test_logits_of_a_few_tokens_at_a_time_give_the_same_gradients(build, train_sparse, n_tokens, monkeypatch):
    monkeypatch.setattr(head, "MIN_TOKENS", n_tokens)
    monkeypatch.setattr(head, "CHUNK_LOGITS", 1)
    pair, ids, widths = build(), tokens(), []
    monkeypatch.setattr(head, "logits_of", lambda *args: widths.append(out := logits_of(*args)) or out)
    losses, found = stepped(pair, [(ids, MASK)], [0, 2], Objective(WEIGHTS, train_sparse))
    loss, expected = naive_gradients(pair, WEIGHTS, ids, MASK, train_sparse, sampled=[0, 2])
    assert max(logits.shape[1] for logits in widths) == max(1, n_tokens // len(ids)) < ids.shape[1]
    assert abs(losses.loss / loss.item() - 1) < 1e-12
    assert_same(found, expected)


def test_a_model_that_computes_all_logits_anyway_gives_them_at_once(monkeypatch):
    monkeypatch.setattr(head, "MIN_TOKENS", 1)
    monkeypatch.setattr(head, "CHUNK_LOGITS", 1)
    pair, ids = PAIRS["equal depth"](), tokens()
    pair.dense.computes_kept_logits_alone = False
    stream = torch.randn(*ids.shape, pair.dense.d_model)
    assert list(head.position_chunks(pair.dense, stream)) == [slice(0, ids.shape[1])]
    assert len(list(head.position_chunks(pair.sparse, stream))) == ids.shape[1]


@pytest.mark.parametrize("train_sparse", [False, True])
@pytest.mark.parametrize("path", ["dsdsds", "sdssds"])
def test_a_path_that_changes_sides_several_times(path, train_sparse):
    pair, ids = PAIRS["equal depth"](), tokens()
    weights, sides = WEIGHTS._replace(path=0.4), ["sparse" if letter == "s" else "dense" for letter in path]
    losses, found = stepped(pair, [(ids, MASK)], [1], Objective(weights, train_sparse), sides)
    loss, ce = naive_objective(pair, weights, ids, MASK, [1])
    kl = naive_path_kl(pair, path, ids, MASK)
    loss = loss + 0.4 * kl + (weights.ce * ce if train_sparse else 0)
    loss.backward()
    assert abs(losses.loss / loss.item() - 1) < 1e-12 and abs(losses.row()["train/kl_path"] / kl.item() - 1) < 1e-12
    assert_same(found, gradients(trained_parameters(pair, train_sparse)))


@pytest.mark.parametrize("count", [1, 2])
def test_the_mean_over_every_sample_of_sites_is_the_full_gradient(count):
    pair, batch, objective = PAIRS["equal depth"](), (tokens(), MASK), Objective(WEIGHTS, True)
    samples = list(combinations(range(5), count))
    every = [stepped(pair, [batch], sample, objective)[1] for sample in samples]
    _, whole = stepped(pair, [batch], range(5), objective)
    assert_same([sum(grads) / len(samples) for grads in zip(*every, strict=True)], whole, 1e-12)


@pytest.mark.parametrize("train_sparse", [False, True])
def test_micro_batches_of_different_token_counts_are_one_batch(train_sparse):
    pair, ids, objective = PAIRS["equal depth"](), tokens(), Objective(WEIGHTS, train_sparse)
    whole_losses, whole = stepped(pair, [(ids, MASK)], [0, 3], objective)
    losses, parts = stepped(pair, [(ids[:1], MASK[:1]), (ids[1:], MASK[1:])], [0, 3], objective)
    assert_same(parts, whole)
    assert losses.tokens == whole_losses.tokens == 17
    for name, value in whole_losses.row().items():
        assert abs(losses.row()[name] / value - 1) < 1e-10


def test_the_losses_are_the_written_out_ones():
    pair, ids = PAIRS["block"](), tokens()
    n = len(pair.bridge_set)
    losses, _ = stepped(pair, [(ids, MASK)], range(n), Objective(WEIGHTS, True))
    (encode, decode, to_sparse, to_dense), ce = naive_losses(pair, ids, MASK)
    row = losses.row()
    for i, site in enumerate(pair.bridge_set.sites):
        for name, value in (
            ("nmse_encode", encode[i]),
            ("nmse_decode", decode[i]),
            ("kl_dense_to_sparse", to_sparse[i]),
            ("kl_sparse_to_dense", to_dense[i]),
        ):
            assert abs(row[f"train/{name}/{site}"] / value.item() - 1) < 1e-10
    assert abs(row["train/ce"] / ce.item() - 1) < 1e-10
    assert len(row) == 4 * n + 2


def test_metric_names():
    losses = StepLosses({"final": 1.0}, {"final": 2.0}, {}, {"final": 3.0}, loss=6.0)
    assert losses.row() == {
        "train/loss": 6.0,
        "train/nmse_encode/final": 1.0,
        "train/nmse_decode/final": 2.0,
        "train/kl_sparse_to_dense/final": 3.0,
    }


@pytest.mark.parametrize("off", ["nmse", "kl_dense_to_sparse", "kl_sparse_to_dense", "ce"])
def test_a_weight_of_zero_takes_its_loss_out_of_the_gradient_but_not_of_the_figures(off):
    pair, ids, weights = PAIRS["equal depth"](), tokens(), WEIGHTS._replace(**{off: 0.0})
    losses, found = stepped(pair, [(ids, MASK)], range(5), Objective(weights, True))
    _, expected = naive_gradients(pair, weights, ids, MASK, True)
    assert_same(found, expected)
    assert losses.row().keys() == stepped(pair, [(ids, MASK)], range(5), Objective(WEIGHTS, True))[0].row().keys()


def test_the_static_loss_scale_is_divided_out_again():
    pair, batch = PAIRS["equal depth"](), (tokens(), MASK)
    plain_losses, plain = stepped(pair, [batch], [2], Objective(WEIGHTS, True))
    losses, scaled = stepped(pair, [batch], [2], Objective(WEIGHTS, True, loss_scale=1024.0))
    assert losses == plain_losses
    assert all(torch.equal(one, other) for one, other in zip(scaled, plain, strict=True))  # a power of two is exact


def test_two_processes_sum_to_the_doubled_batch():
    pair, ids, n = PAIRS["equal depth"](), tokens(), 5
    whole_losses, whole = stepped(pair, [(ids.repeat(2, 1), MASK.repeat(2, 1))], range(n), Objective(WEIGHTS, True))
    losses, mine = stepped(pair, [(ids, MASK)], range(n), Objective(WEIGHTS, True, reduce=lambda t: 2 * t))
    assert_same([2 * grad for grad in mine], whole)
    assert losses.tokens == 34 and abs(losses.loss / whole_losses.loss - 1) < 1e-12


def peak_saved_elements(n_layers, naive):
    """Most elements of tensors that graphs keep alive at any one time."""
    pair, ids = join(gpt2(n_layers, 16), sparse_model(n_layers, 16)), tokens(2, 8)
    for parameter in (*pair.dense.model.parameters(), *pair.sparse.model.parameters()):
        parameter.requires_grad_(False)
    live, peak = 0, 0

    class Kept:
        def __init__(self, tensor):
            nonlocal live, peak
            self.tensor = tensor.detach()
            live += tensor.numel()
            peak = max(peak, live)

        def __del__(self):
            nonlocal live
            live -= self.tensor.numel()

    with saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        if naive:
            naive_objective(pair, WEIGHTS, ids)[0].backward()
        else:
            step_gradients(pair, [(ids, None)], range(len(pair.bridge_set)), Objective(WEIGHTS))
    return peak


def test_one_tails_graph_is_alive_at_a_time():
    """Doubling the depth doubles the longest tail but makes four times of all tails together."""
    shallow, deep = (peak_saved_elements(n, naive=False) for n in (2, 4))
    assert 1.5 < deep / shallow < 2.3
    naive_shallow, naive_deep = (peak_saved_elements(n, naive=True) for n in (2, 4))
    assert naive_deep / naive_shallow > 2.7 and naive_deep > 4 * deep


def test_frozen_parts_of_a_sparse_model_that_trains_are_left_out():
    """The embedding and the first layer: the first streams then have no graph."""
    pair, ids = PAIRS["equal depth"](), tokens()
    everywhere = range(len(pair.bridge_set))
    _, whole = stepped(pair, [(ids, MASK)], everywhere, Objective(WEIGHTS, True))
    pair = PAIRS["equal depth"]()
    every, body = trained_parameters(pair, True), pair.sparse.model.transformer
    for parameter in (*body.wte.parameters(), *body.h[0].parameters()):
        parameter.requires_grad_(False)
    trains = [parameter.requires_grad for parameter in every]
    _, some = stepped(pair, [(ids, MASK)], everywhere, Objective(WEIGHTS, True))
    assert sum(trains) == len(some) < len(whole)
    assert_same(some, [g for g, train in zip(whole, trains, strict=True) if train])


@pytest.mark.parametrize("mask", [[[1, 1, 0]], [[1, 0, 0]]])
def test_a_step_in_which_no_target_varies_has_no_reconstruction_loss(mask):
    """One counted token, or none; with none that another follows, no cross-entropy either."""
    pair, mask = PAIRS["equal depth"](), torch.tensor(mask)
    losses, found = stepped(pair, [(tokens(1, 3), mask)], [1], Objective(WEIGHTS, True))
    assert losses.nmse_encode == losses.nmse_decode == {}
    assert not any("nmse" in name for name in losses.row()) and math.isfinite(losses.loss)
    refuse_not_finite(losses, 1)
    assert losses.kl_sparse_to_dense["0.mlp"] > 0 and (losses.ce > 0) == bool(mask[0, 1])
    assert all(g.isfinite().all() for g in found) and any(g.any() for g in found)


def test_a_site_whose_target_does_not_vary_is_left_out_and_counts_as_zero_in_the_mean():
    """One token at every position and no position embedding: the first stream is the same embedding everywhere."""
    pair, ids = PAIRS["equal depth"](), torch.full((3, 6), 4)
    with torch.no_grad():
        pair.dense.model.transformer.wpe.weight.zero_()
        pair.sparse.model.transformer.wpe.weight.zero_()
    weights = Weights(1.0, 0.0, 0.0, 0.0)
    losses, found = stepped(pair, [(ids, None)], [4], Objective(weights))
    assert "0.attn" not in losses.nmse_encode and "0.attn" not in losses.nmse_decode
    assert "train/nmse_encode/0.attn" not in losses.row() and "train/nmse_encode/0.mlp" in losses.row()
    total = sum(losses.nmse_encode.values()) + sum(losses.nmse_decode.values())
    assert losses.loss == pytest.approx(total / 5, rel=1e-12)
    first = list(pair.bridge_set[0].parameters())
    assert not any(g.any() for g in found[: len(first)]) and all(g.isfinite().all() for g in found)


def test_a_run_is_not_stopped_by_steps_in_which_no_target_varies():
    """Rows of two tokens, one of them counted, and one row per step."""
    settings = {"steps": 2, "batch_size": 1, "sites": ("0.mlp", "final"), "sites_per_step": "all"}
    found = fit(gpt2(), sparse_model(), tokens(40, 2), progress=False, **settings)
    for row in found.history:
        assert math.isfinite(row["train/loss"]) and not any("nmse" in name for name in row)
        assert row["train/kl_sparse_to_dense/final"] > 0
    assert all(math.isfinite(value) for value in found.report.mean.values())


def test_a_loss_that_is_nan_for_another_reason_stays():
    pair = PAIRS["equal depth"]()
    with torch.no_grad():
        pair.sparse.model.transformer.h[1].mlp.c_proj.weight[0, 0] = float("nan")
    losses, _ = stepped(pair, [(tokens(), MASK)], [1], Objective(WEIGHTS))
    assert math.isnan(losses.nmse_encode["final"]) and math.isnan(losses.loss)
    with pytest.raises(FloatingPointError, match="step 1: nmse_encode at site final is nan"):
        refuse_not_finite(losses, 1)


def test_with_dropout_micro_batches_are_divided_by_the_variance_of_the_streams_they_sum_over(monkeypatch):
    pair, ids = join(gpt2(), sparse_model(dropout=0.4)), tokens()
    pair.sparse.model.train()
    batches = [(ids[:1], MASK[:1]), (ids[1:], MASK[1:])]
    runs, trace = [], pair.sparse.trace

    def recorded(*args, **options):
        runs.append(trace(*args, **options))
        return runs[-1]

    monkeypatch.setattr(pair.sparse, "trace", recorded)
    torch.manual_seed(0)
    losses, _ = stepped(pair, batches, [1], Objective(WEIGHTS, True))
    summed = runs[-2:]  # the passes that gradients came from, one for each micro-batch
    dense = pair.dense.residuals(ids, MASK)[0]
    counted = counted_tokens(ids, MASK)
    for i, bridge in enumerate(pair.bridge_set):
        z = torch.cat([run.residuals[i] for run in summed]).detach()[counted]
        h = dense[i].detach()[counted]
        assert losses.nmse_encode[pair.bridge_set.sites[i]] == pytest.approx(naive_nmse(bridge.encode(h), z).item())
        assert losses.nmse_decode[pair.bridge_set.sites[i]] == pytest.approx(naive_nmse(bridge.decode(z), h).item())
    pair.sparse.model.eval()
    assert not torch.equal(trace(*batches[0]).residuals[-1], summed[0].residuals[-1]), "dropout was on"
