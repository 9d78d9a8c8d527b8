import pytest
import torch

from bridges.models.loading import as_residual
from bridges.models.tokens import check_tokens


def test_checked_tokens_have_a_mask_of_ones_and_zeros_and_padding_that_both_models_have(tiny):
    wide, narrow = as_residual(tiny("gpt2", vocab_size=62)), as_residual(tiny("llama"))
    ids, mask = torch.tensor([[61, 61, 3, 4], [5, 6, 7, 60]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    checked = check_tokens("data", ids, mask.bool(), wide, narrow)
    assert checked[0].tolist() == [[0, 0, 3, 4], [5, 6, 7, 60]] and checked[1].dtype == torch.long
    assert torch.equal(checked[1], mask) and ids[0, 0] == 61
    assert check_tokens("data", ids, mask, wide)[0] is ids
    with pytest.raises(ValueError, match=r"data holds token 61; valid ids are 0 to 60 \(the models have 61 and 62 tok"):
        check_tokens("data", ids, None, wide, narrow)
    with pytest.raises(ValueError, match=r"attention_mask holds 0.5; it must be 1 at real tokens"):
        check_tokens("data", ids, mask / 2, wide)
