"""Changing a model for a while, and leaving it as it was found: modes, gradients, replaced methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, evaluation mode and no parameter that asks for a gradient; both as they were afterwards."""
    asking = [p for p in model.parameters() if p.requires_grad]
    with eval_mode(model):
        try:
            for parameter in asking:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in asking:
                parameter.requires_grad_(True)


@contextmanager
def train_mode(model: nn.Module) -> Iterator[None]:
    """Inside, training mode; every module's own mode, and gradients cleared, afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.train()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        model.zero_grad(set_to_none=True)


@contextmanager
def replaced_forwards(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, each module computes another way what it computes; its hooks run as ever."""
    with ExitStack() as stack:
        for module, forward in replacements.items():
            stack.enter_context(attribute(module, "forward", forward))
        yield


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, an object has another value under a name of its own; afterwards what it had before, or none."""
    own = vars(owner)
    had, before = name in own, own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if had:
            own[name] = before
        else:
            own.pop(name, None)
