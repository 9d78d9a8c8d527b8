"""Every function that takes both models says so when they are given the other way round."""

import pytest
from pairs import gpt2, join, sparse_model, tokens, with_units

import bridges

TAKERS = {
    "evaluate": lambda one, two, bridge_set: bridges.evaluate(one, two, bridge_set, tokens()),
    "hybrid_losses": lambda one, two, bridge_set: bridges.hybrid_losses(one, two, bridge_set, tokens()),
    "steer": lambda one, two, bridge_set: bridges.steer(one, bridge_set, [], sparse=two).__enter__(),
    "find_channels": lambda one, two, bridge_set: bridges.find_channels(one, two, bridge_set, "for_while"),
}


@pytest.mark.parametrize("function", TAKERS)
def test_swapped_models_are_recognised(function):
    pair = with_units(join(gpt2(), sparse_model()))
    dense, sparse = pair.dense.model, pair.sparse.model
    pair.bridge_set.record_models(dense, sparse)
    with pytest.raises(ValueError, match=r"dense=SparseTransformer is not .* dense and sparse are swapped"):
        TAKERS[function](sparse, dense, pair.bridge_set)
