"""Calls of decoder layers and their modules: recorded, repeated with another stream, or replaced for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from bridges.models.modes import replaced_attribute, uncompiled


class CallArguments(NamedTuple):
    """The arguments of a layer's call, without the stream."""

    args: tuple
    kwargs: dict[str, Any]
    positional: bool
    """True where the stream was the first positional argument, False where it was `hidden_states=`."""

    def call(self, function: Callable[..., Any], hidden: Tensor) -> Any:
        """Call a layer, or its forward, with these arguments and `hidden` as the stream."""
        if self.positional:
            return function(hidden, *self.args, **self.kwargs)
        return function(*self.args, hidden_states=hidden, **self.kwargs)


class LayerCall(NamedTuple):
    """One recorded call of a layer or module that maps a stream to a stream."""

    hidden: Tensor
    """The stream that went in."""
    arguments: CallArguments
    output: Tensor
    """The stream that came out."""
    tuple_length: int
    """Length of the tuple in which the output stood, 0 for a bare tensor."""


def split_arguments(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, CallArguments]:
    """The stream, and the other arguments."""
    if args:
        return args[0], CallArguments(args[1:], kwargs, True)
    rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return kwargs["hidden_states"], CallArguments((), rest, False)


def output_hidden(output: Any) -> Any:
    """The stream in a layer's output: the output itself, or the first entry of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def as_output(hidden: Tensor, tuple_length: int) -> Any:
    """`hidden` in the form of a layer's output: first in a tuple of that length, bare where the length is 0."""
    return (hidden, *[None] * (tuple_length - 1)) if tuple_length else hidden


@contextmanager
def record_calls(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, LayerCall]]:
    """Inside, the last call of each module is recorded if a stream goes in and comes out, in the order of the calls."""
    calls: dict[nn.Module, LayerCall] = {}

    def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if (args and isinstance(args[0], Tensor)) or "hidden_states" in kwargs:
            hidden, arguments = split_arguments(args, kwargs)
            if isinstance(output_hidden(output), Tensor):
                length = len(output) if isinstance(output, tuple) else 0
                calls[module] = LayerCall(hidden, arguments, output_hidden(output), length)

    with uncompiled(), ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(record, with_kwargs=True).remove)
        yield calls


@contextmanager
def replace_calls(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, calling a module calls its replacement; the module's own hooks do not run."""
    with uncompiled(), ExitStack() as stack:
        for module, call in replacements.items():
            if "_compiled_call_impl" in vars(module):  # of module.compile(); it would be called first
                stack.enter_context(replaced_attribute(module, "_compiled_call_impl", None))
            # Not `forward`: torch would run the module's hooks around it, and accelerate keeps its own hook there.
            stack.enter_context(replaced_attribute(module, "_call_impl", call))
        yield
