import pytest
import torch
from pairs import MASK, at, counted_places, naive_variance, real_places, tokens

from bridges.objective.normalizers import (
    BatchMoments,
    combine_moments,
    counted_tokens,
    nmse,
    predicting_tokens,
    stream_moments,
)


def streams(rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda d: torch.randn(rows, width, d, generator=generator, dtype=torch.float64) + 3  # noqa: E731
    return [(draw(3), draw(5)) for _ in range(2)]


def test_counted_are_the_real_tokens_but_the_first():
    by_hand = [
        [0, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 1, 1, 1, 1],
        [0, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]
    assert torch.equal(counted_tokens(tokens(), MASK), torch.tensor(by_hand).bool())
    assert torch.equal(counted_tokens(tokens()), torch.tensor([[0, 1, 1, 1, 1, 1, 1]] * 4).bool())


def test_predicting_tokens_are_the_real_tokens_that_a_real_one_follows():
    by_hand = [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    assert torch.equal(predicting_tokens(tokens(), MASK), torch.tensor(by_hand).bool())
    assert predicting_tokens(tokens()).all() and predicting_tokens(tokens()).shape == (4, 6)


@pytest.mark.parametrize("mask", [None, MASK])
def test_the_normalizers_of_one_batch_are_those_counted_by_hand(mask):
    both, ids = streams(4, 7, 0), tokens()
    found = combine_moments([stream_moments(both, ids, mask)])
    assert found.tokens == len(real_places(ids, mask)) == (28 if mask is None else 17)
    assert found.predictions == (24 if mask is None else 13)
    for i, (dense, sparse) in enumerate(both):
        places = counted_places(ids, mask)
        assert abs(found.variance_dense[i] / naive_variance(at(dense, places)) - 1) < 1e-12
        assert abs(found.variance_sparse[i] / naive_variance(at(sparse, places)) - 1) < 1e-12


def test_batches_of_different_token_counts_add_up_to_the_whole():
    both, ids = streams(4, 7, 1), tokens()
    whole = combine_moments([stream_moments(both, ids, MASK)])
    parts = [slice(0, 1), slice(1, 3), slice(3, 4)]  # the last counts no token at all
    moments = [stream_moments([(d[p], s[p]) for d, s in both], ids[p], MASK[p]) for p in parts]
    for one, two in zip(combine_moments(moments), whole, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=0)


def test_two_processes_with_one_batch_each_have_what_one_has_with_both():
    both, ids = streams(4, 7, 2), tokens()
    moments = stream_moments(both, ids, MASK)
    alone = combine_moments([moments, moments])
    together = combine_moments([moments], reduce=lambda tensor: 2 * tensor)
    for one, two in zip(together, alone, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=0)
    assert together.tokens == 34


def test_what_padding_holds_does_not_matter():
    both = streams(4, 7, 3)
    spoiled = [tuple(h.masked_fill(~MASK.bool()[..., None], float("nan")) for h in site) for site in both]
    one, two = (combine_moments([stream_moments(s, tokens(), MASK)]) for s in (both, spoiled))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_process_without_a_batch_adds_nothing():
    both, ids = streams(4, 7, 2), tokens()
    moments = stream_moments(both, ids, MASK)
    with_empty = combine_moments([BatchMoments.empty(2, 3, 5, torch.device("cpu")), moments])
    for one, two in zip(with_empty, combine_moments([moments]), strict=True):
        assert torch.equal(one, two)


def test_the_nmse_is_the_error_over_the_variance_in_the_errors_dtype():
    error = torch.tensor([3.0, 5.0], requires_grad=True)
    found = nmse(error, torch.tensor([2.0, 4.0], dtype=torch.float64))
    found.sum().backward()
    assert found.tolist() == [1.5, 1.25] and found.dtype == torch.float32
    assert error.grad.tolist() == [0.5, 0.25]


def test_without_variance_the_nmse_is_undefined_and_has_no_gradient():
    prediction = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    found = nmse(prediction.square().sum(1), torch.tensor([0.0, 2.0], dtype=torch.float64))
    assert found[0].isnan() and found[1] == 12.5
    found.sum().backward()
    assert prediction.grad.tolist() == [[0.0, 0.0], [3.0, 4.0]]
    assert nmse(torch.tensor(0.0), torch.tensor(0.0)).isnan(), "also where the prediction is right"


def test_a_variance_of_nan_is_not_hidden():
    error = torch.tensor(1.0, requires_grad=True)
    found = nmse(error, torch.tensor(float("nan")))
    found.backward()
    assert found.isnan() and error.grad.isnan()
