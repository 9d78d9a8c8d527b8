"""Calling one decoder layer by hand: its recorded arguments, its way of returning, its parts replaced for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from bridges.models.modes import attribute


class Call(NamedTuple):
    """The arguments a layer was called with, the stream left out."""

    args: tuple
    kwargs: dict[str, Any]
    positional: bool
    """Whether the stream came first among `args` rather than as `hidden_states=`."""

    def args_with(self, hidden: Tensor) -> tuple:
        """Positional arguments with `hidden` as the stream."""
        return (hidden, *self.args) if self.positional else self.args

    def kwargs_with(self, hidden: Tensor) -> dict[str, Any]:
        """Keyword arguments with `hidden` as the stream."""
        return self.kwargs if self.positional else {**self.kwargs, "hidden_states": hidden}


def split_call(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The stream, and the rest of the call."""
    if args:
        return args[0], Call(args[1:], kwargs, True)
    rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return kwargs["hidden_states"], Call((), rest, False)


def hidden_of(returned: Any) -> Any:
    """The stream in what a layer or module returned, be it a tensor or a tuple that starts with one."""
    return returned[0] if isinstance(returned, tuple) else returned


def like(returned: int, hidden: Tensor) -> Any:
    """`hidden` returned as a tuple of `returned` entries, or bare where that is 0."""
    return (hidden, *[None] * (returned - 1)) if returned else hidden


@contextmanager
def replaced_calls(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, each module's call is another, hooks included: what is not computed has no read to see or to edit."""
    with ExitStack() as stack:
        for module, call in replacements.items():
            # Not `forward`: torch would run the module's hooks around it, and accelerate keeps its own hook there.
            stack.enter_context(attribute(module, "_call_impl", call))
        yield
