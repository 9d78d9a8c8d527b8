import pytest
import torch
from torch import nn

from bridges.models.huggingface.calls import hidden_of, like, replaced_calls, split_call
from bridges.models.modes import replaced_forwards

STREAM = torch.ones(1, 2, 3)


def test_a_call_is_put_together_as_it_was_taken_apart():
    other = torch.zeros(1, 2, 3)
    hidden, call = split_call((STREAM, "mask"), {"scale": 2})
    assert hidden is STREAM
    assert call.args_with(other) == (other, "mask") and call.kwargs_with(other) == {"scale": 2}
    hidden, call = split_call((), {"scale": 2, "hidden_states": STREAM})
    assert hidden is STREAM and call.args_with(other) == ()
    assert call.kwargs_with(other) == {"scale": 2, "hidden_states": other}


def test_the_stream_is_found_in_and_put_into_what_a_layer_returns():
    assert hidden_of(STREAM) is hidden_of((STREAM, None)) is STREAM
    assert like(0, STREAM) is STREAM
    assert like(3, STREAM) == (STREAM, None, None)


def test_calls_replace_a_call_and_its_hooks_and_come_off_on_every_way_out():
    module, seen = nn.Linear(3, 3), []
    module.register_forward_hook(lambda *_: seen.append("hook"))
    own = module.forward = lambda x: x + 1  # accelerate leaves such an instance attribute
    before = dict(vars(module))
    with replaced_calls({module: lambda x: x * 5}):
        assert torch.equal(module(STREAM), STREAM * 5) and seen == []
        with replaced_calls({module: lambda x: x * 7}):
            assert torch.equal(module(STREAM), STREAM * 7)
        assert torch.equal(module(STREAM), STREAM * 5)
    with pytest.raises(KeyError), replaced_calls({module: lambda x: x * 5}):
        raise KeyError
    assert vars(module) == before and module.forward is own
    assert torch.equal(module(STREAM), STREAM + 1) and seen == ["hook"]


def test_replaced_forwards_leave_the_hooks_in_place():
    module, seen = nn.Linear(3, 3), []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    before = dict(vars(module))
    with replaced_forwards({module: lambda x: x * 5}):
        assert torch.equal(module(STREAM), STREAM * 5) and seen == [STREAM]
    assert vars(module) == before
