"""What a steer() does around each call of its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from transformers import Cache

from bridges.models.modes import not_recomputed
from bridges.steering.call_state import CallState, CurrentCall
from bridges.steering.edits import Edit, SiteEdit
from bridges.steering.model_call import ModelCall, check_counts_tokens, parse_call, returned_caches
from bridges.steering.packing import refuse_packed_prompt, refuse_packing
from bridges.steering.plan import ActivePlans, Plan, unedited
from bridges.steering.positions import Prompt, PromptTracker
from bridges.steering.readings import CompanionReader, Readings
from bridges.steering.registry import CallTracker


class ConstantTracker(CallTracker):
    """For edits that add one number everywhere: keeps the backward pass from running edited layers again."""

    def __init__(self, plan: Plan, active: ActivePlans):
        self.plan, self.active = plan, active

    def forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one forward pass of the model."""
        if self.active.paused:
            return forward(*args, **kwargs)
        with not_recomputed(self.plan.hooked_modules):
            return forward(*args, **kwargs)

    def generating(self, prompts: Sequence[Prompt | None]) -> AbstractContextManager[None]:
        """Inside, a `generate` with these prompts runs; it needs nothing."""
        return nullcontext()

    def check_generate(self, input_ids: Tensor, arguments: Mapping[str, Any]) -> None:
        """One vector at every token is right whatever a row holds."""

    def generating_batch(self) -> None:
        """One vector at every token is right in packed rows too."""

    def close(self) -> None:
        """Leave nothing behind."""


class PlanTracker(ConstantTracker):
    """Runs each call of the model with its state at hand, where edits depend on tokens, prompts or readings."""

    def __init__(self, plan: Plan, active: ActivePlans):
        super().__init__(plan, active)
        self.prompts = _prompt_tracker([edit for site_edit in plan.site_edits for edit in site_edit.edits])
        read_model = plan.dense if plan.source == "encoder" else plan.sparse
        self.reader = None
        if plan.reading and read_model is not None:
            self.reader = CompanionReader(read_model, plan.source == "encoder")
        self.current = CurrentCall(plan.dense.model)

    def close(self) -> None:
        """Leave the caches that were used as the dense model alone would have made them."""
        self.prompts.clear()
        if self.reader is not None:
            self.reader.companion.detach_caches()

    def generating(self, prompts: Sequence[Prompt | None]) -> AbstractContextManager[None]:
        """Inside, a `generate` with these prompts runs."""
        return self.prompts.generating(prompts)

    def check_generate(self, input_ids: Tensor, arguments: Mapping[str, Any]) -> None:
        """Refuse prompts of several documents; `generate` makes the positions of its own calls."""
        refuse_packed_prompt(input_ids, arguments)

    def generating_batch(self) -> None:
        """Refused: it packs prompts into one row, and its errors are lost in a thread."""
        raise ValueError(
            "generate_batch (continuous batching) packs several prompts into one row, which edits that depend on the "
            "tokens cannot follow: call generate, or use edits that add one number everywhere"
        )

    def forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one forward pass of the model."""
        if self.active.paused:
            return forward(*args, **kwargs)
        call = parse_call(self.plan.dense.model, args, kwargs)
        if not self.prompts.in_generate:  # which makes the positions itself; after padded prompts they begin again
            refuse_packing(call)
        if call.logits_by_index and self.plan.edits_head_input:
            raise ValueError("logits_to_keep must be an integer when an edit changes the input of the unembedding")
        span = self.prompts.locate(call)
        readings, companion_cache = self._read(call)
        with self.current.running(CallState(span, readings)):
            output = super().forward(forward, *args, **kwargs)
        for cache in {call.cache, *returned_caches(output)} - {None}:
            check_counts_tokens(self.plan.dense.model, cache, call.n_past + call.input_ids.shape[1])
            self.prompts.record(cache, span)
            if self.reader is not None and companion_cache is not None:
                self.reader.companion.attach_cache(cache, companion_cache)
        return output

    def _read(self, call: ModelCall) -> tuple[Readings, Cache | None]:
        """The readings that need a separate run, and the cache of that run."""
        separate = [site_edit for site_edit in self.plan.reading if self._needs_separate_run(site_edit)]
        if self.reader is None or not separate:
            return {}, None
        same = self.reader.residual_model.model is self.plan.dense.model
        with unedited(self.plan.dense.model) if same else nullcontext():
            return self.reader.read(call, separate)

    def _needs_separate_run(self, site_edit: SiteEdit) -> bool:
        """Whether the stream at the site may be edited already when the encoder could read it on its way."""
        first = site_edit is self.plan.site_edits[0] and len(self.active) == 1
        return self.plan.source == "sparse" or not first


def _prompt_tracker(edits: Sequence[Edit]) -> PromptTracker:
    placed: list[Any] = [edit.positions for edit in edits if edit.positions is not None]
    placed.sort(key=lambda positions: min(positions, default=0))  # an error names those from the prompt's end
    return PromptTracker(next(iter(placed), None), any(isinstance(edit.value, Tensor) for edit in edits))
