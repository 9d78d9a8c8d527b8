import pytest
import torch
from torch import nn

from bridges.models.huggingface.calls import as_output, output_hidden, record_calls, replace_calls, split_arguments
from bridges.models.modes import replaced_forwards

STREAM = torch.ones(1, 2, 3)


def test_a_call_is_repeated_with_another_stream():
    other = torch.zeros(1, 2, 3)

    def given(*args, **kwargs):
        return args, kwargs

    hidden, arguments = split_arguments((STREAM, "mask"), {"scale": 2})
    assert hidden is STREAM and arguments.call(given, other) == ((other, "mask"), {"scale": 2})
    hidden, arguments = split_arguments((), {"scale": 2, "hidden_states": STREAM})
    assert hidden is STREAM and arguments.call(given, other) == ((), {"scale": 2, "hidden_states": other})


def test_the_stream_is_the_output_or_the_first_entry_of_its_tuple():
    assert output_hidden(STREAM) is output_hidden((STREAM, None)) is STREAM
    assert as_output(STREAM, 0) is STREAM
    assert as_output(STREAM, 3) == (STREAM, None, None)


def test_calls_from_stream_to_stream_are_recorded_in_their_order():
    class Two(nn.Module):
        def forward(self, x, *, hidden_states):
            return hidden_states + x, "weights"

    two, one, no_stream = Two(), nn.Linear(3, 3), nn.Embedding(2, 3)
    with record_calls([one, no_stream, two]) as calls:
        two(STREAM, hidden_states=STREAM)
        out = one(STREAM)
        no_stream(input=torch.zeros(1, dtype=torch.long))
    assert list(calls) == [two, one]
    assert calls[one].hidden is STREAM and calls[one].output is out and calls[one].tuple_length == 0
    assert torch.equal(calls[two].output, 2 * STREAM) and calls[two].tuple_length == 2
    one(STREAM + 1)
    assert calls[one].hidden is STREAM  # the hooks are gone


def test_a_replaced_call_runs_no_hook_and_is_undone_on_every_way_out():
    module, seen = nn.Linear(3, 3), []
    module.register_forward_hook(lambda *_: seen.append("hook"))
    own = module.forward = lambda x: x + 1  # accelerate leaves such an instance attribute
    before = dict(vars(module))
    with replace_calls({module: lambda x: x * 5}):
        assert torch.equal(module(STREAM), STREAM * 5) and seen == []
        with replace_calls({module: lambda x: x * 7}):
            assert torch.equal(module(STREAM), STREAM * 7)
        assert torch.equal(module(STREAM), STREAM * 5)
    with pytest.raises(KeyError), replace_calls({module: lambda x: x * 5}):
        raise KeyError
    assert vars(module) == before and module.forward is own
    assert torch.equal(module(STREAM), STREAM + 1) and seen == ["hook"]


def test_a_replaced_forward_still_runs_the_hooks():
    module, seen = nn.Linear(3, 3), []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    before = dict(vars(module))
    with replaced_forwards({module: lambda x: x * 5}):
        assert torch.equal(module(STREAM), STREAM * 5) and seen == [STREAM]
    assert vars(module) == before
