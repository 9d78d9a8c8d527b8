import pytest
import torch
from pairs import MASK, at, counted_places, naive_variance, real_places, tokens

from bridges.objective.normalizers import combine_moments, counted_tokens, predicting, stream_moments


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


def test_predicting_are_the_real_tokens_that_a_real_one_follows():
    by_hand = [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    assert torch.equal(predicting(tokens(), MASK), torch.tensor(by_hand).bool())
    assert predicting(tokens()).all() and predicting(tokens()).shape == (4, 6)


@pytest.mark.parametrize("mask", [None, MASK])
def test_the_scale_of_one_batch_is_counted_by_hand(mask):
    both, ids = streams(4, 7, 0), tokens()
    scale = combine_moments([stream_moments(both, ids, mask)])
    assert scale.tokens == len(real_places(ids, mask)) == (28 if mask is None else 17)
    assert scale.predictions == (24 if mask is None else 13)
    for i, (dense, sparse) in enumerate(both):
        places = counted_places(ids, mask)
        assert abs(scale.variance_dense[i] / naive_variance(at(dense, places)) - 1) < 1e-12
        assert abs(scale.variance_sparse[i] / naive_variance(at(sparse, places)) - 1) < 1e-12


def test_batches_of_different_token_counts_add_up_to_the_whole():
    both, ids = streams(4, 7, 1), tokens()
    whole = combine_moments([stream_moments(both, ids, MASK)])
    parts = [slice(0, 1), slice(1, 3), slice(3, 4)]  # the last counts no token at all
    shares = [stream_moments([(d[p], s[p]) for d, s in both], ids[p], MASK[p]) for p in parts]
    for one, two in zip(combine_moments(shares), whole, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=0)


def test_two_processes_with_one_batch_each_have_what_one_has_with_both():
    both, ids = streams(4, 7, 2), tokens()
    share = stream_moments(both, ids, MASK)
    alone = combine_moments([share, share])
    together = combine_moments([share], reduce=lambda tensor: 2 * tensor)
    for one, two in zip(together, alone, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=0)
    assert together.tokens == 34


def test_what_padding_holds_does_not_matter():
    both = streams(4, 7, 3)
    spoiled = [tuple(h.masked_fill(~MASK.bool()[..., None], float("nan")) for h in site) for site in both]
    one, two = (combine_moments([stream_moments(s, tokens(), MASK)]) for s in (both, spoiled))
    assert all(torch.equal(a, b) for a, b in zip(one[:4], two[:4], strict=True))
    for a, b in zip(one.means, two.means, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
