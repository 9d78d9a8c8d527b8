import math

import pytest
import torch
from pairs import sparse_model, tokens
from scipy.optimize import minimize

from bridges.circuits.task_loss import (
    MAX_SCALE,
    Calibration,
    Presented,
    accuracy,
    answer_differences,
    calibrate,
    task_loss,
)
from bridges.tasks.pairs import TaskPairs


def pairs():
    ids, other = tokens(6, 8, seed=1), tokens(6, 8, seed=2)
    mask = torch.ones_like(ids)
    mask[::2, :3] = 0
    answers = torch.tensor([[1, 2], [3, -1], [4, -1], [1, 2], [5, 6], [7, -1]])
    targets = torch.tensor([[8, -1, -1], [9, 10, 11], [12, -1, -1], [8, -1, -1], [1, -1, -1], [2, -1, -1]])
    return TaskPairs("mine", ids, other, mask, answers, targets, torch.tensor([0, 1, 0, 1, 1, 0]))


def test_a_difference_is_that_of_the_log_sums_of_both_answers_logits_after_the_last_token():
    model, given = sparse_model().eval(), pairs()
    prompts = Presented.of(given, "cpu")
    with torch.no_grad():
        found = answer_differences(model, prompts)
        for i in range(12):
            row, swapped = i % 6, i >= 6
            ids = (given.counterfactual_ids if swapped else given.input_ids)[row][given.attention_mask[row].bool()]
            logits = model(ids[None]).logits[0, -1]
            right, wrong = (given.targets, given.answers) if swapped else (given.answers, given.targets)
            sums = [sum(logits[t].exp() for t in one[row].tolist() if t >= 0).log() for one in (right, wrong)]
            assert found[i].item() == pytest.approx((sums[0] - sums[1]).item(), rel=1e-9)
            first = (given.direction[row] == 0) != swapped
            assert prompts.sign[i] == (1 if first else -1)


def test_the_loss_by_hand():
    d, s = torch.tensor([2.0, -1.0]), torch.tensor([1.0, -1.0])
    expected = (math.log1p(math.exp(-(3 * 2 + 0.5))) + math.log1p(math.exp(-(3 * -1 - 0.5)))) / 2
    assert task_loss(d, s, 3.0, 0.5).item() == pytest.approx(expected, rel=1e-6)
    assert task_loss(torch.zeros(3), torch.ones(3)).item() == pytest.approx(math.log(2))
    assert accuracy(d, s, Calibration(3.0, 0.5)) == 0.5
    assert accuracy(d, s, Calibration(1.0, -1.5)) == 1.0


@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0])
def test_scale_and_shift_are_those_of_least_loss(size):
    generator = torch.Generator().manual_seed(4)
    sign = torch.where(torch.arange(200) % 2 == 0, 1.0, -1.0).double()
    d = size * (0.4 + torch.randn(200, generator=generator, dtype=torch.float64) + 0.3 * sign)
    found = calibrate(d, sign)

    def loss(x):
        return task_loss(d, sign, x[0] / size, x[1]).item()

    best = minimize(loss, [1.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14, "maxiter": 4000})
    if best.x[0] / size <= MAX_SCALE:
        assert task_loss(d, sign, *found).item() == pytest.approx(best.fun, rel=1e-6)
    else:
        assert found.scale <= MAX_SCALE


def test_prompts_that_are_all_right_are_scaled_by_the_most():
    assert calibrate(torch.full((8,), 1e-3), torch.tensor([1.0, -1.0] * 4)).scale == MAX_SCALE
