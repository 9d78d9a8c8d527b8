"""Wraps `forward` and `generate` of a steered model, so that every steer() active in it follows its calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from functools import partial, update_wrapper
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bridges.models.modes import replaced_attribute
from bridges.steering.positions import Prompt


class CallTracker(ABC):
    """What one steer() does around the calls of its model."""

    @abstractmethod
    def forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one forward pass of the model, by calling `forward` with the arguments."""

    @abstractmethod
    def generating(self, prompts: Sequence[Prompt | None]) -> AbstractContextManager[None]:
        """Inside, a `generate` with these prompts runs: its own, None where it was given no tokens; then guidance's."""

    @abstractmethod
    def check_generate(self, input_ids: Tensor, arguments: Mapping[str, Any]) -> None:
        """Called before a `generate` with these tokens and named arguments; ValueError if it cannot be followed."""

    @abstractmethod
    def generating_batch(self) -> None:
        """Called before a `generate_batch`; raises ValueError where its packed calls cannot be followed."""


class _Registry:
    """The trackers of one model, which may come and go in any order."""

    def __init__(self) -> None:
        self.trackers: list[CallTracker] = []
        self.undo = ExitStack()
        """Gives the model its own methods back."""


_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
"""Methods that read prompts packed into one row, in a thread of their own."""

_REGISTRIES: WeakKeyDictionary[nn.Module, _Registry] = WeakKeyDictionary()
"""The registry of every model that has trackers."""


@contextmanager
def register(model: nn.Module, tracker: CallTracker) -> Iterator[None]:
    """Inside, the tracker follows every call of `model(...)`, `model.generate(...)` and `model.generate_batch(...)`."""
    registry = _REGISTRIES.setdefault(model, _Registry())
    if not registry.trackers:
        wraps = {"forward": wrap_forward, "generate": partial(wrap_generate, model)}
        for name, wrap in (wraps | dict.fromkeys(_BATCHING, wrap_batching)).items():
            if hasattr(model, name):
                wrapped = _Wrapped(getattr(model, name), wrap(getattr(model, name), registry.trackers))
                registry.undo.enter_context(replaced_attribute(model, name, wrapped))
    registry.trackers.append(tracker)
    try:
        yield
    finally:
        registry.trackers.remove(tracker)
        if not registry.trackers:
            registry.undo.close()
            del _REGISTRIES[model]


class _Wrapped:
    """A method in place of a model's own. A deep copy of the model has its own method, not this one."""

    def __init__(self, method: Callable[..., Any], replacement: Callable[..., Any]):
        update_wrapper(self, method)  # Hugging Face looks at its signature
        self._replacement = replacement

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._replacement(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return deepcopy(self.__wrapped__, memo)  # pyright: ignore[reportAttributeAccessIssue]


def wrap_forward(forward: Callable[..., Any], trackers: Sequence[CallTracker]) -> Callable[..., Any]:
    """`forward`, run by every tracker, each around the one before it."""

    def tracked(*args: Any, **kwargs: Any) -> Any:
        run = forward
        for tracker in trackers:
            run = partial(tracker.forward, run)
        return run(*args, **kwargs)

    return tracked


def wrap_generate(
    model: nn.Module, generate: Callable[..., Any], trackers: Sequence[CallTracker]
) -> Callable[..., Any]:
    """`generate`, whose prompt every tracker is given: its first forward pass may read a piece of it, or more."""

    def tracked(*args: Any, **kwargs: Any) -> Any:
        prompts = _prompts(model, args, kwargs)
        with ExitStack() as stack:
            for tracker in trackers:
                if (ids := _input_ids(args, kwargs)) is not None:
                    tracker.check_generate(ids, kwargs)
                stack.enter_context(tracker.generating(prompts))
            return generate(*args, **kwargs)

    return tracked


def wrap_batching(method: Callable[..., Any], trackers: Sequence[CallTracker]) -> Callable[..., Any]:
    """A method of continuous batching, which every tracker may refuse."""

    def tracked(*args: Any, **kwargs: Any) -> Any:
        for tracker in trackers:
            tracker.generating_batch()
        return method(*args, **kwargs)

    return tracked


def _input_ids(args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tokens that `generate` is given, None where it is given none."""
    inputs = (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
    return next((one for one in inputs if isinstance(one, Tensor)), None)


def _prompts(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[Prompt | None]:
    """The prompt that `generate` is given, None where it is given no tokens; then that of its guidance, if any."""
    ids = _input_ids(args, kwargs)
    prompts = [None if ids is None else _prompt(ids, kwargs.get("attention_mask"))]
    negative = kwargs.get("negative_prompt_ids")
    if negative is None and ids is not None:
        negative = ids[:, -1:]
    if negative is not None and _has_guidance(model, args, kwargs):
        prompts.append(_prompt(negative, kwargs.get("negative_prompt_attention_mask")))
    return prompts


def _has_guidance(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a guidance scale is given: to `generate`, in the configuration it is given, or in the model's own."""
    config = args[1] if len(args) > 1 else kwargs.get("generation_config")
    scales = (getattr(one, "guidance_scale", None) for one in (config, getattr(model, "generation_config", None)))
    return any(scale is not None for scale in (kwargs.get("guidance_scale"), *scales))


def _prompt(ids: Tensor, mask: Tensor | None) -> Prompt:
    """A mask longer than the tokens covers those of a cache, too, which they follow."""
    fits = mask is not None and len(mask) == len(ids) and mask.ndim == 2 and mask.shape[1] >= ids.shape[1]
    return Prompt(ids, mask.long() if fits else torch.ones_like(ids))  # pyright: ignore[reportOptionalMemberAccess]
