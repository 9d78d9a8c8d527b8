"""counterfactual(): the other prompt's reading as an edit."""

import pytest
from pairs import MASK, tokens
from steered import CHANNEL, SITE

from bridges.steering.counterfactual import counterfactual


def test_a_counterfactual_is_zero_on_padding_and_checks_its_arguments(pair):
    ids = tokens()
    edit = counterfactual(pair.sparse.model, SITE, CHANNEL, ids, ids.flip(0), MASK)
    assert not edit.value[MASK == 0].any() and edit.value[MASK == 1].any()
    with pytest.raises(ValueError, match=r"input_ids \(4, 7\) and counterfactual_ids \(4, 6\)"):
        counterfactual(pair.sparse.model, SITE, CHANNEL, ids, ids[:, 1:])
    with pytest.raises(ValueError, match="channel=12 must lie between 0 and 11"):
        counterfactual(pair.sparse.model, SITE, 12, ids, ids)
