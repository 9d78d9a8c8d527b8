import copy
import pickle
from itertools import chain

import pytest
import torch

from bridges.data.rows import Rows


def rows(n=7, seed=3, mask=None):
    return Rows(torch.arange(n)[:, None].expand(n, 4).clone(), mask, seed)


def first_column(batch):
    return batch[0][:, 0].tolist()


def test_take_is_an_endless_sequence_of_permutations():
    data = rows()
    taken = first_column(data.take(0, 7 * 6))
    epochs = [taken[i : i + 7] for i in range(0, len(taken), 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1 and epochs[0] != list(range(7))


@pytest.mark.parametrize("size", [1, 3, 10, 14])
def test_the_order_does_not_depend_on_how_it_is_cut(size):
    whole = first_column(rows().take(0, 42))
    # In reverse, so that no hidden cursor could help.
    parts = [first_column(rows().take(start, min(size, 42 - start))) for start in reversed(range(0, 42, size))]
    assert list(chain.from_iterable(reversed(parts))) == whole
    assert first_column(rows(seed=4).take(0, 42)) != whole


def test_shuffling_leaves_the_global_random_state():
    state = torch.get_rng_state()
    rows().take(0, 30)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_mask_goes_with_its_row():
    mask = torch.ones(7, 4).long()
    mask[torch.arange(7) % 2 == 1, 2:] = 0
    ids, taken = rows(mask=mask).take(5, 20)
    assert torch.equal(taken[:, 3], 1 - ids[:, 0] % 2)
    assert rows(mask=torch.ones(7, 4).long()).take(0, 2)[1] is None


def test_in_order_gives_every_row_once_with_its_mask():
    assert [first_column(batch) for batch in rows().in_order(3)] == [[0, 1, 2], [3, 4, 5], [6]]
    mask = torch.ones(7, 4).long()
    mask[6, 1:] = 0
    assert rows(mask=mask).in_order(3)[2][1].tolist() == [[1, 0, 0, 0]]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda data: pickle.loads(pickle.dumps(data))])
def test_a_copy_gives_the_same_rows_and_follows_a_seed_of_its_own(copied):
    data = rows(seed=3)
    before = first_column(data.take(0, 14))
    copy_of_it = copied(data)
    assert first_column(copy_of_it.take(0, 14)) == before
    copy_of_it.seed = 4
    assert first_column(copy_of_it.take(0, 14)) == first_column(rows(seed=4).take(0, 14)) != before
    assert first_column(data.take(0, 14)) == before


def test_split_gives_all_but_the_last_rows_and_the_last_rows():
    mask = torch.ones(7, 4).long()
    mask[6, 1:] = 0
    train, heldout = rows(mask=mask, seed=5).split(2)
    assert train.input_ids[:, 0].tolist() == [0, 1, 2, 3, 4] and heldout.input_ids[:, 0].tolist() == [5, 6]
    assert train.attention_mask is None and heldout.attention_mask[1].tolist() == [1, 0, 0, 0]
    assert (len(train), train.seq_len, train.seed, heldout.seed) == (5, 4, 5, 5)


def test_rows_hold_a_number_of_tokens_that_are_not_padding():
    mask = torch.ones(7, 4).long()
    mask[:4, 1:] = 0  # 1, 1, 1, 1, 4, 4, 4 tokens
    asked = (0, 1, 2, 4, 5, 8, 9, 16, 17, 99)
    assert [rows(mask=mask).rows_holding(n) for n in asked] == [1, 1, 2, 4, 5, 5, 6, 7, 7, 7]
    assert [rows().rows_holding(n) for n in (0, 1, 4, 5, 28, 99)] == [1, 1, 1, 2, 7, 7]
    data = rows(mask=mask)
    for n_tokens in range(1, 17):
        n_rows = data.rows_holding(n_tokens, shuffled=True)
        held = [int(data.take(0, count)[1].sum()) for count in (n_rows - 1, n_rows) if count]
        assert held[-1] >= n_tokens and (n_rows == 1 or held[0] < n_tokens)


def test_the_fingerprint_is_of_tokens_mask_and_shape_alone():
    ids = torch.arange(12).view(3, 4)
    mark = Rows(ids).fingerprint()
    assert Rows(ids.int(), torch.ones(3, 4).long(), seed=9).fingerprint() == mark
    changed, mask = ids.clone(), torch.ones(3, 4).long()
    changed[2, 3] = 0
    mask[2, 3] = 0
    others = [Rows(changed), Rows(ids, mask), Rows(ids.view(4, 3)), Rows(ids[:2]), Rows(ids.T)]
    assert len({mark, *(other.fingerprint() for other in others)}) == 6


def test_a_tensor_without_rows_is_refused():
    with pytest.raises(ValueError, match=r"data of shape \[0, 4\] must be \[n, seq\]"):
        Rows(torch.zeros(0, 4).long())
