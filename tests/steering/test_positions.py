"""Which tokens positions name, and which part of a value per token falls on a call."""

import pytest
import torch

from bridges.steering.positions import Prompt, TokenSpan

# Two rows: five real tokens, and two of padding before three real ones; the prompt is all of them.
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
PROMPT = Prompt(torch.zeros_like(MASK), MASK)
WHOLE = TokenSpan(MASK, 0, PROMPT)
# One token generated after each of them, read with the cache of the prompt, and without.
AFTER = TokenSpan(torch.cat([MASK, torch.ones(2, 1).long()], 1), 5, None)
GROWN = TokenSpan(AFTER.attention_mask, 0, PROMPT)


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
def test_positions_count_the_real_tokens_of_each_row(positions, whole, after):
    assert WHOLE.mask_at(positions).long().tolist() == whole
    assert AFTER.mask_at(positions).long().tolist() == after
    assert torch.equal(GROWN.mask_at(positions), torch.cat([WHOLE.mask_at(positions), AFTER.mask_at(positions)], 1))


def test_values_per_token_end_with_the_prompt_and_repeat_for_beams():
    value = torch.tensor([[1.0, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    assert torch.equal(WHOLE.prompt_values(value), value)
    assert AFTER.prompt_values(value).tolist() == [[0], [0]]
    assert GROWN.prompt_values(value).tolist() == [[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 10, 0]]
    longer = torch.ones(2, 6).long()
    assert torch.equal(TokenSpan(longer, 0, Prompt(longer, longer)).prompt_values(value), GROWN.prompt_values(value))
    beams = TokenSpan(torch.ones(4, 5).long(), 0, PROMPT)
    assert torch.equal(beams.prompt_values(value), value[[0, 0, 1, 1]])


def test_values_of_a_prompt_in_pieces_fall_on_their_tokens():
    value = torch.tensor([[1.0, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    piece = TokenSpan(MASK[:, :4], 2, PROMPT)
    assert torch.equal(piece.prompt_values(value), value[:, 2:4])
    new = Prompt(torch.zeros(2, 3).long(), MASK)  # after two tokens of a cache
    assert new.start == 2 and torch.equal(TokenSpan(MASK, 2, new).prompt_values(value[:, :3]), value[:, :3])


def test_values_that_do_not_fit_the_prompts_are_refused():
    with pytest.raises(ValueError, match=r"value=\(3, 5\) is for 3 rows, the model was given 2"):
        WHOLE.prompt_values(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"value=\(2, 6\) is longer than the prompts, \(2, 5\)"):
        WHOLE.prompt_values(torch.zeros(2, 6))
    padded = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match=r"value=\(2, 5\) is shorter than the prompts, \(2, 6\), which are padded"):
        TokenSpan(padded, 0, Prompt(padded, padded)).prompt_values(torch.zeros(2, 5))
    five = Prompt(padded[:, :5], padded[:, :5])  # the prompt of five and one token more, without a cache
    assert TokenSpan(padded, 0, five).prompt_values(torch.ones(2, 5)).tolist() == [[1, 1, 1, 1, 1, 0]] * 2
