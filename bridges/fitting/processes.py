"""The processes of a run, by accelerate."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from bridges.fitting.watch import Watch


def is_main_process() -> bool:
    """Whether this process is the main one of its run, outside a `ProcessGroup` too."""
    from accelerate import PartialState

    return PartialState().is_main_process


class ProcessGroup:
    """The processes of a run, by accelerate: this one's rank and device, sums over all of them, and autocast.

    A context manager: accelerate's state is a singleton, which the user may need after this one; leaving the context
    puts it back as it was. Inside, a process that dies ends those that wait for it (`Watch`).
    """

    def __init__(self, mixed_precision: str = "no"):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        self._shared_state = AcceleratorState._shared_state
        self._state_before = dict(self._shared_state)
        if self._state_before and AcceleratorState().mixed_precision != mixed_precision:
            AcceleratorState._reset_state()
        self.accelerator = Accelerator(mixed_precision=mixed_precision)
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.is_main: bool = self.accelerator.is_main_process
        self.device: torch.device = self.accelerator.device
        self._watch: Watch | None = None

    def __enter__(self) -> ProcessGroup:
        # Accelerators such as TPUs sum over processes without a process group of torch, and so without a store.
        if self.world_size > 1 and torch.distributed.is_available() and torch.distributed.is_initialized():
            self._watch = Watch(self.rank, self.world_size)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if self._watch is not None:
            self._watch.close(error)
        self._shared_state.clear()
        self._shared_state.update(self._state_before)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over processes, on the tensor's own device; ProcessLost if another process died or failed."""
        if self.world_size == 1:
            return tensor
        with self._explaining_errors():
            total: Any = self.accelerator.reduce(tensor.to(self.device), "sum")
            if total.is_cuda:  # NCCL only queues the sum: wait for it here, where the watch can end the wait
                torch.cuda.current_stream(total.device).synchronize()
            return total.to(tensor.device)

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copy the main process's values into the tensors of every process.

        Without it they may differ: a model was built without a seed, or solvers of two machines round differently.
        """
        for tensor in tensors if self.world_size > 1 else ():
            tensor.copy_(self.all_reduce(tensor.detach() if self.is_main else torch.zeros_like(tensor)))

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum the gradients of the parameters over processes, one reduction per dtype and device."""
        if self.world_size == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        for key in dict.fromkeys((g.dtype, g.device) for g in grads):  # in one order on every process
            group = [g for g in grads if (g.dtype, g.device) == key]
            total = self.all_reduce(torch.cat([g.flatten() for g in group]))
            for grad, part in zip(group, total.split([g.numel() for g in group]), strict=True):
                grad.copy_(part.view(grad.shape))

    def refuse_unequal(self, name: str, description: str) -> None:
        """ValueError on every process unless all of them give the same `description` of what `name` names."""
        digest = hashlib.blake2b(description.encode(), digest_size=16).digest()
        # Sums of 32-bit words are exact in float64.
        words = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, len(digest), 4)]
        mine = torch.tensor(words, dtype=torch.float64)
        differs = (self.all_reduce(mine) != self.world_size * mine).any().double()
        # A second sum, since a process that does not see the difference would wait for the others forever.
        if self.all_reduce(differs) > 0:
            raise ValueError(f"{name} differs between processes; seed its order, so that every process reads the same")

    def barrier(self) -> None:
        """Wait until every process reaches this point; ProcessLost if another one died or failed."""
        with self._explaining_errors():
            self.accelerator.wait_for_everyone()

    def autocast(self) -> AbstractContextManager:
        """Mixed precision; no context where it is off."""
        return nullcontext() if self.accelerator.mixed_precision == "no" else self.accelerator.autocast()

    def _explaining_errors(self) -> AbstractContextManager:
        return nullcontext() if self._watch is None else self._watch.explaining()
