"""The steerings that are installed in a model: paused together, and told together what `generate` is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from bridges.models.modes import attribute
from bridges.models.residual import ResidualModel
from bridges.steering.positions import Windows


class Steering:
    """One `steer()`, as far as the others are concerned."""

    idle: bool
    windows: Windows


class Installed(list[Steering]):
    """The steerings in a model, innermost last; they may leave in any order."""

    def __init__(self):
        super().__init__()
        self.leaving = ExitStack()
        """What the last of them does when it leaves."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the model runs as if none were."""
        before = [steering.idle for steering in self]
        try:
            for steering in self:
                steering.idle = True
            yield
        finally:
            for steering, idle in zip(self, before, strict=True):
                steering.idle = idle

    def telling(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`generate`, whose prompt is told: its first pass may hold a part of it, or guesses of what follows."""

        @wraps(generate)
        def told(*args: Any, **kwargs: Any) -> Any:
            prompts = [
                ids for ids in (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")) if isinstance(ids, Tensor)
            ]
            with ExitStack() as stack:
                for steering in self if prompts else ():
                    stack.enter_context(steering.windows.generating(prompts[0], kwargs.get("attention_mask")))
                return generate(*args, **kwargs)

        return told

    def __deepcopy__(self, _memo: Any) -> Installed:
        raise ValueError("the model is steered, and a copy of it would be by halves; leave steer() before copying it")


def installed(model: nn.Module | ResidualModel) -> Installed:
    """Those in a model, an empty list where there is none."""
    return vars(model.model if isinstance(model, ResidualModel) else model).get("_steering", Installed())


@contextmanager
def listed(model: nn.Module, steering: Steering) -> Iterator[None]:
    """Inside, a steering is among those of its model."""
    active = installed(model)
    if not active:
        active.leaving.enter_context(attribute(model, "_steering", active))
        if hasattr(model, "generate"):
            active.leaving.enter_context(attribute(model, "generate", active.telling(model.generate)))  # pyright: ignore
    active.append(steering)
    try:
        yield
    finally:
        active.remove(steering)
        if not active:
            active.leaving.close()


_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def lock(model: nn.Module | ResidualModel) -> Any:
    """Held while a model is taken apart or read: threads that steer two dense models may share one sparse model."""
    return _LOCKS.setdefault(model.model if isinstance(model, ResidualModel) else model, RLock())
