"""Contexts that change a model, or how it runs, and restore it on exit: modes, requires_grad, methods, compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch
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
    trainable = [(m, name) for m in model.modules() for name, p in m.named_parameters(recurse=False) if p.requires_grad]
    with eval_mode(model):
        try:
            for module, name in trainable:
                module._parameters[name].requires_grad_(False)  # pyright: ignore[reportOptionalMemberAccess]
            yield
        finally:
            for module, name in trainable:
                # Not the parameter of before: every call of an offloaded module leaves a new one.
                parameter: nn.Parameter = module._parameters[name]  # pyright: ignore[reportAssignmentType]
                # torch sets it back there alone, on a tensor that was made there
                with torch.inference_mode() if parameter.is_inference() else nullcontext():
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


@contextmanager
def not_recomputed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, gradient checkpointing is off for these modules: the backward pass does not run them again.

    It would run them as they are then, without the hooks and replaced methods that the forward pass had.
    """
    with ExitStack() as stack:
        for module in modules:
            if module.training and getattr(module, "gradient_checkpointing", False):
                stack.enter_context(replaced_attribute(module, "gradient_checkpointing", False))
        yield


def refuse_recomputation() -> None:
    """ValueError if this is the forward pass of a `torch.utils.checkpoint` of the user's own.

    Its backward pass, which may come after the context, would run the model again as it is then. The variant with
    `use_reentrant=True` leaves no trace by which it could be told here.
    """
    autograd = getattr(torch._C, "_autograd", None)
    top = getattr(autograd, "_top_saved_tensors_default_hooks", None)  # torch has no public way to ask
    hooks = None if top is None else top(True)
    # A user's own hooks may be anything that can be called.
    if hooks and getattr(hooks[0], "__qualname__", "").startswith("_checkpoint_hook"):
        raise ValueError(
            "an edited model runs inside torch.utils.checkpoint, whose backward pass would run it again without the "
            "edits; use model.gradient_checkpointing_enable(), which is followed, or call the model without checkpoint"
        )


class _Uncompiled:
    """Counts those inside `uncompiled`; the first one forces the eager mode, the last one ends it."""

    lock = Lock()
    inside = 0
    stance: Any = None


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, whatever torch.compile compiled runs as it was written, in every thread.

    Compiled code does not see hooks and methods that came after it, and would keep those that it was compiled with.
    """
    if torch.compiler.is_compiling():
        yield
        return
    with _Uncompiled.lock:
        if _Uncompiled.inside == 0:
            _Uncompiled.stance = torch.compiler.set_stance("force_eager")
            _Uncompiled.stance.__enter__()
        _Uncompiled.inside += 1
    try:
        yield
    finally:
        with _Uncompiled.lock:
            _Uncompiled.inside -= 1
            if _Uncompiled.inside == 0:
                _Uncompiled.stance.__exit__(None, None, None)
