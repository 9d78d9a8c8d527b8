"""Random draws that leave the caller's random state as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Inside, `torch.manual_seed` may be called; the CPU's and every accelerator's generator come back afterwards.

    `torch.manual_seed` seeds all devices of the machine, not only those that hold a model.
    """
    accelerator = torch.accelerator.current_accelerator()
    device_type = "cuda" if accelerator is None else accelerator.type
    devices = range(torch.get_device_module(device_type).device_count())
    with torch.random.fork_rng(devices, device_type=device_type):
        yield
