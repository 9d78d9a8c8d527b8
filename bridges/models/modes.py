"""Contexts that change a model and restore it on exit: train or eval mode, requires_grad, replaced methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, evaluation mode; afterwards every module's own mode again."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, evaluation mode and no parameter that requires a gradient; afterwards both as before."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    with eval_mode(model):
        try:
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)


@contextmanager
def train_mode(model: nn.Module) -> Iterator[None]:
    """Inside, training mode; afterwards every module's own mode again, and no gradients."""
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
    """Inside, each module's forward is replaced; its hooks still run."""
    with ExitStack() as stack:
        for module, forward in replacements.items():
            stack.enter_context(replaced_attribute(module, "forward", forward))
        yield


@contextmanager
def replaced_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, an object's own attribute has another value; afterwards its old value, or no such attribute."""
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
