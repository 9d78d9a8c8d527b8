"""Where edits fall, and what several edits of one channel make of it."""

import pytest
import torch

from bridges.steering.edits import Edit
from bridges.steering.positions import Place, Window

# Two rows: five real tokens, and two of padding before three real ones; the prompt is all of them.
WHOLE = Window(
    mask=torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
    prompt=torch.tensor([[5], [3]]),
    prompt_width=5,
    start=0,
)
# One token generated after each of them.
AFTER = Window(torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]), torch.tensor([[5], [3]]), 5, 5)


def place(edits, channels=(3, 8), reading=None):
    units = torch.eye(len(channels), dtype=torch.float64), torch.ones(len(channels), dtype=torch.float64)
    return Place(0, 0, 0, list(channels), edits, *units, reading)


@pytest.mark.parametrize(
    ("positions", "whole", "after"),
    [
        ((0,), [[1, 0, 0, 0, 0], [0, 0, 1, 0, 0]], [[0], [0]]),
        ((-1,), [[0, 0, 0, 0, 1], [0, 0, 0, 0, 1]], [[0], [0]]),
        ((1, -2), [[0, 1, 0, 1, 0], [0, 0, 0, 1, 0]], [[0], [0]]),
        ((3,), [[0, 0, 0, 1, 0], [0, 0, 0, 0, 0]], [[0], [1]]),  # the fourth token of the second row is generated
        ((9,), [[0] * 5, [0] * 5], [[0], [0]]),
    ],
)
def test_positions_count_real_tokens_of_each_row(positions, whole, after):
    assert WHOLE.at(positions).long().tolist() == whole
    assert AFTER.at(positions).long().tolist() == after


def test_values_per_token_end_with_the_prompt_and_repeat_for_beams():
    value = torch.tensor([[1.0, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    assert torch.equal(WHOLE.columns(value), value)
    assert AFTER.columns(value).tolist() == [[0], [0]]
    longer = Window(torch.ones(2, 6).long(), torch.tensor([[6], [6]]), 6, 0)
    assert longer.columns(value).tolist() == [[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 10, 0]]
    beams = Window(torch.ones(4, 5).long(), torch.full((4, 1), 5), 5, 0)
    assert torch.equal(beams.columns(value), value[[0, 0, 1, 1]])


def test_values_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"value=\(3, 5\) is for 3 rows, the model was given 2"):
        WHOLE.columns(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"value=\(2, 6\) is longer than the prompts, \(2, 5\)"):
        WHOLE.columns(torch.zeros(2, 6))
    padded = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match=r"value=\(2, 5\) is shorter than the prompts, \(2, 6\), which are padded"):
        Window(padded, padded.sum(1, keepdim=True), 6, 0).columns(torch.zeros(2, 5))
    grown = Window(padded, torch.tensor([[4], [5]]), 5, 0)  # without a cache: the prompt of five and one token more
    assert grown.columns(torch.ones(2, 5)).tolist() == [[1, 1, 1, 1, 1, 0]] * 2


def test_edits_of_one_channel_compose_in_order_and_others_stay():
    reading = torch.arange(20, dtype=torch.float64).view(2, 5, 2)
    edits = [Edit("0.attn", 3, 2.0, "scale"), Edit("0.attn", 3, 1.0, "add"), Edit("0.attn", 8, 7.0, "set", (0,))]
    found = place(edits, reading=reading).changes(WHOLE)
    real = WHOLE.real
    assert torch.equal(found[..., 0], torch.where(real, 2 * reading[..., 0] + 1, reading[..., 0]) - reading[..., 0])
    expected = torch.zeros(2, 5, dtype=torch.float64)
    expected[0, 0], expected[1, 2] = 7 - reading[0, 0, 1], 7 - reading[1, 2, 1]
    assert torch.equal(found[..., 1], expected)
    swapped = place([edits[1], edits[0]], channels=(3,), reading=reading[..., :1])
    assert swapped.changes(WHOLE)[0, 1, 0] == 2 * (reading[0, 1, 0] + 1) - reading[0, 1, 0]


def test_constant_edits_are_one_vector_and_need_no_reading():
    constant = place([Edit("0.attn", 8, 2.0, "add"), Edit("0.attn", 3, 1.0, "add"), Edit("0.attn", 8, 0.5, "add")])
    assert constant.constant and constant.mode is None and constant.total().tolist() == [1.0, 2.5]
    reading = place([Edit("0.attn", 3, 2.0, "add"), Edit("0.attn", 3, 2.0, "scale")])
    assert not reading.constant and reading.mode == "scale"
