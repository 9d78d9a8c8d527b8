"""Every function that takes both models says so when they are given the other way round."""

import pytest
from pairs import gpt2, join, sparse_model, tokens, with_units

import bridges
from bridges.bridge import Bridge, BridgeSet
from bridges.models.loading import as_residual

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


def test_check_models_recognises_swapped_models(tiny):
    dense, sparse = tiny("gpt2"), tiny("llama")
    bridge_set = BridgeSet([("0.attn", "0.attn")], [Bridge(3, 4, k=2)])
    bridge_set.record_models(dense, sparse)
    message = (
        r"dense=LlamaForCausalLM is not the model that these bridges were fitted to \('GPT2LMHeadModel'\), but the "
        r"other one \('LlamaForCausalLM'\): dense and sparse are swapped"
    )
    for models in (
        (sparse, dense),
        (as_residual(sparse), as_residual(dense)),
        (sparse, None),
        (sparse.bfloat16(), dense),
    ):
        with pytest.raises(ValueError, match=message):
            bridge_set.check_models(*models)
    with pytest.raises(ValueError, match=r"sparse=GPT2LMHeadModel is not .* but the other one .* one is given twice"):
        bridge_set.check_models(dense, dense)
    bridge_set.record_models(dense, dense)
    bridge_set.check_models(dense, dense)
