import pytest
import torch
from pairs import join, tokens
from step_pair import KINDS, WITH_A_MOVE, models, steps
from written_out import WrittenOut

from bridges.fitting.sparse_training import SparseTraining
from bridges.objective.hybrid import hybrid_losses


def small(**options):
    return models(layers=1, d_dense=32, d_sparse=48, vocab=32, seq=16, density=1 / 4, **options)


def test_the_written_out_losses_are_ours():
    """Both share the models' modules alone."""
    dense, sparse = (model.double() for model in small())
    pair = join(dense, sparse, k=12)
    ids = tokens(3, 16, seed=3) % 32
    found, ce = WrittenOut(dense, sparse, pair.bridge_set).losses(ids)
    losses = hybrid_losses(dense, sparse, pair.bridge_set, ids)
    for one, other in zip(found, losses, strict=True):
        torch.testing.assert_close(torch.stack(one), other, rtol=1e-10, atol=0)
    logits = sparse(ids).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(ce, torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()), rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_both_steps_start_from_the_same_loss_and_frozen_ones_go_the_same_way(kind):
    """Sparse models that train have other schedules: ours warms up."""
    dense, sparse = small()
    with steps(dense, sparse, 1 / 4, kind, batch=2, seq=16) as functions:
        ours, written = ([step() for _ in range(6)] for step in (functions["ours"], functions["written out"]))
    assert abs(ours[0] / written[0] - 1) < 1e-5
    if kind == "frozen":
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(written), rtol=1e-4, atol=0)


def test_a_step_with_a_move_ends_in_one_and_the_steps_about_it_do_not(monkeypatch):
    moved, move = [], SparseTraining._move

    def noted(training, support, schedule, step):
        moved.append(step)
        move(training, support, schedule, step)

    monkeypatch.setattr(SparseTraining, "_move", noted)
    dense, sparse = small()
    with steps(dense, sparse, 1 / 4, "moving support", batch=2, seq=16, move_every=10) as functions:
        for name in ("ours", WITH_A_MOVE, "ours", WITH_A_MOVE, WITH_A_MOVE, "ours"):
            functions[name]()
    assert moved == [10, 20, 30]
    with steps(dense, sparse, 1 / 4, "fixed support", batch=2, seq=16) as functions:
        assert WITH_A_MOVE not in functions
