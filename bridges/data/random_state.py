"""Random draws that leave the caller's random state as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Inside, `torch.manual_seed` may be called; the CPU's and every accelerator's generator come back afterwards.

    `torch.manual_seed` seeds all devices of the machine, not only those that hold a model. In a process forked from one
    that used the accelerator, whose devices nobody can use there, only the CPU's generator is read and set.
    """
    accelerator = torch.accelerator.current_accelerator()
    device_type = "cuda" if accelerator is None else accelerator.type
    module = torch.get_device_module(device_type)
    devices = [] if module._is_in_bad_fork() else range(module.device_count())
    with torch.random.fork_rng(devices, device_type=device_type):
        yield


class RandomState(NamedTuple):
    """The states of the generators that a model on one device draws from."""

    cpu: Tensor
    device: Tensor | None
    """None for a model on the CPU."""


def random_state(device: torch.device) -> RandomState:
    """The state of the CPU's generator, and of the device's where that is an accelerator."""
    own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    return RandomState(torch.get_rng_state(), own)


@contextmanager
def draws_from(state: RandomState, device: torch.device) -> Iterator[None]:
    """Inside, the draws on `device` follow `state`; afterwards the generators go on from where they were."""
    on_cpu = state.device is None
    with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        torch.set_rng_state(state.cpu)
        if state.device is not None:
            torch.get_device_module(device).set_rng_state(state.device, device)
        yield
