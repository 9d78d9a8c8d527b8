"""steer(): inside it, an ordinary Hugging Face model runs with edits of sparse channels pushed into it.

Read: the sublayer's input, after the norm. Reading: the value of a channel in the read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Cache

from bridges.bridge import BridgeSet
from bridges.models.loading import as_residual
from bridges.models.residual import HookFunction, ResidualModel
from bridges.steering.call_state import CallState, CurrentCall, change_hook, encode_hook
from bridges.steering.companion import model_lock
from bridges.steering.delta import EntryPoint
from bridges.steering.edits import Edit, SiteEdit, as_edit_list, build_site_edit, check_edits
from bridges.steering.model_call import ModelCall, parse_call, returned_caches
from bridges.steering.positions import Prompt, PromptTracker
from bridges.steering.readings import CompanionReader, Readings
from bridges.steering.registry import CallTracker, register

Source = Literal["sparse", "encoder"]


@contextmanager
def steer(
    dense: nn.Module | ResidualModel | str | Path,
    bridge_set: BridgeSet,
    edits: Edit | Sequence[Edit],
    *,
    sparse: nn.Module | ResidualModel | str | Path | None = None,
    strength: float = 1.0,
    at: EntryPoint = "read",
    source: Source = "sparse",
    check_models: bool = True,
) -> Iterator[nn.Module]:
    """Run the dense model with edits of sparse channels, pushed through the bridges' decoders into it.

    Source: method.md, section 4; paper A.4. `dense` and `sparse` are model objects, `ResidualModel`s, folders or hub
    ids; the context yields the dense model. Inside, its forward passes and `generate` work as usual: with a (dynamic)
    cache or without, greedy, sampled or with beams, padded on either side. Contexts nest; edits of one channel apply in
    order. Strength 0 or no edits install nothing and change no bit.

    `at="read"` adds each edit to the input of the dense sublayer alone; `at="residual"` adds it to the stream, so that
    every later layer sees it. Edits that set or scale need the channel's reading: from the `sparse` model, which runs
    on the same tokens, or (`source="encoder"`) from the encoder on the unedited dense stream. Readings carry no
    gradient.

    Negative positions, and values per token, refer to the prompt. The prompt is what `generate` is given, in whatever
    pieces it is read. Outside `generate` it is what the first call on a cache reads, and a call without a cache is its
    own prompt: in a loop over growing prefixes without a cache, position -1 is the last token of every call.

    On every way out the model is as it was, and so are the caches that it filled: they hold its own layers alone. Edits
    belong to the model, not to a thread: another thread that runs the same dense model meanwhile runs it with them, and
    unless they add one number everywhere its calls must not overlap. Two threads may steer two dense models, which may
    share a sparse one. Gradient checkpointing, which runs layers again after the call, goes with edits that add one
    number everywhere; with others a forward pass in training mode that records gradients raises ValueError.

    Raises ValueError, before anything is changed, for edits that the bridges cannot carry over, and for models other
    than those the bridges were fitted to (unless `check_models` is False), at strength 0 too.

    >>> import bridges, torch
    >>> pair = bridges.load_pair()
    >>> ids = torch.randint(1024, (16, 16), generator=torch.Generator().manual_seed(0))
    >>> bridge_set = bridges.fit(pair.dense, pair.sparse, ids, steps=0, progress=False, sites=("0.mlp",))
    >>> with steer(pair.dense, bridge_set, Edit("0.mlp", 3, 2.0, "add")) as dense, torch.no_grad():
    ...     steered = dense(ids[:1]).logits  # [1, 16, 1024]
    >>> torch.equal(steered, pair.dense(ids[:1]).logits)
    False
    """
    edits = as_edit_list(edits)
    for name, value, known in (("at", at, get_args(EntryPoint)), ("source", source, get_args(Source))):
        if value not in known:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")
    check_edits(bridge_set, edits, strength)
    with _unedited(dense):  # outer edits are off while the model is decomposed
        residual_model, sparse_residual = as_residual(dense), None
        if sparse is not None:
            with model_lock(sparse):
                sparse_residual = as_residual(sparse)
        if check_models:
            bridge_set.check_models(residual_model.model, None if sparse_residual is None else sparse_residual.model)
        plan = _build_plan(residual_model, sparse_residual, bridge_set, edits, strength, at, source)
    if edits and strength != 0:
        with _installed(plan):
            yield residual_model.model
    else:
        yield residual_model.model


@dataclass(frozen=True, eq=False)
class _Plan:
    """What one steer() does. Nothing of it changes."""

    dense: ResidualModel
    sparse: ResidualModel | None
    site_edits: list[SiteEdit]
    """In the order of the dense sites."""
    at: EntryPoint
    source: Source

    @property
    def reading(self) -> list[SiteEdit]:
        """Those that need readings."""
        return [site_edit for site_edit in self.site_edits if site_edit.reading_mode]

    @property
    def edits_head_input(self) -> bool:
        """Whether an edit changes what the unembedding reads."""
        return self.at == "read" and self.site_edits[-1].dense_site == len(self.dense.sites) - 1


def _build_plan(
    dense: ResidualModel,
    sparse: ResidualModel | None,
    bridge_set: BridgeSet,
    edits: list[Edit],
    strength: float,
    at: EntryPoint,
    source: Source,
) -> _Plan:
    site_edits = [
        build_site_edit(dense, sparse, bridge_set, site, [e for e in edits if e.site == site], strength, at)
        for site in dict.fromkeys(edit.site for edit in edits)
    ]
    site_edits.sort(key=lambda site_edit: site_edit.dense_site)
    plan = _Plan(dense, sparse, site_edits, at, source)
    if plan.reading and source == "sparse" and sparse is None:
        first = plan.reading[0]
        raise ValueError(
            f"mode={first.reading_mode!r} at site={first.edits[0].site!r} needs the channel's reading: pass sparse=, "
            "the model to read it from, or source='encoder'"
        )
    return plan


class _ActivePlans(list[_Plan]):
    """The plans of every steer() that a model is in, kept on the model as `_steer_plans`."""

    paused = False
    """Whether the model runs without any edit for a while."""

    def __deepcopy__(self, _memo: Any) -> _ActivePlans:
        if self.paused:  # decompose copies submodules, without their hooks
            return _ActivePlans()
        raise ValueError("model is steered, and a copy would keep the hooks of the edits; leave steer() to copy it")


def _active_plans(model: nn.Module | ResidualModel | str | Path) -> _ActivePlans:
    model = model.model if isinstance(model, ResidualModel) else model
    return vars(model).get("_steer_plans", _ActivePlans()) if isinstance(model, nn.Module) else _ActivePlans()


@contextmanager
def _unedited(model: nn.Module | ResidualModel | str | Path) -> Iterator[None]:
    """Inside, the model runs without the edits of any steer()."""
    active = _active_plans(model)
    before, active.paused = active.paused, True
    try:
        yield
    finally:
        active.paused = before


@contextmanager
def _installed(plan: _Plan) -> Iterator[None]:
    """Inside, the model runs with the edits."""
    model, active = plan.dense.model, _active_plans(plan.dense)
    with ExitStack() as stack:
        tracker = None
        if not all(site_edit.constant for site_edit in plan.site_edits):
            tracker = _PlanTracker(plan, active)
            stack.callback(tracker.close)
            stack.enter_context(register(model, tracker))
        stack.enter_context(_listed(plan, active))
        for site_edit in plan.site_edits:
            for hook in _hooks(plan, site_edit, active, tracker):
                stack.enter_context(hook)
        yield


@contextmanager
def _listed(plan: _Plan, active: _ActivePlans) -> Iterator[None]:
    """Inside, the plan is among those of its model. Plans may leave in any order; the last one removes the list."""
    attributes = vars(plan.dense.model)
    attributes["_steer_plans"] = active
    active.append(plan)
    try:
        yield
    finally:
        active.remove(plan)
        if not active:
            del attributes["_steer_plans"]


def _hooks(
    plan: _Plan, site_edit: SiteEdit, active: _ActivePlans, tracker: _PlanTracker | None
) -> Iterator[AbstractContextManager[None]]:
    """The hooks of one site: they add its edits to the stream, or to what each module reads of it."""

    def unless_paused(hook: HookFunction) -> HookFunction:
        return lambda h: None if active.paused else hook(h)

    def add(unit: Tensor) -> HookFunction:
        if site_edit.constant or tracker is None:
            return _constant_hook(site_edit, unit)
        return change_hook(site_edit, unit, tracker.current)

    add_to_stream = add(site_edit.to_stream) if plan.at == "residual" else None
    if tracker is not None and plan.source == "encoder" and site_edit.reading_mode:
        add_to_stream = encode_hook(site_edit, add_to_stream, tracker.current)
    if add_to_stream is not None:
        yield plan.dense.hook_residuals({site_edit.dense_site: unless_paused(add_to_stream)})
    yield plan.dense.hook_modules({module: unless_paused(add(unit)) for module, unit in site_edit.to_reads.items()})


def _constant_hook(site_edit: SiteEdit, unit: Float[Tensor, "channels d"]) -> HookFunction:
    """Adds one vector at every token."""
    vectors: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def hook(h: Tensor) -> Tensor:
        key = (h.dtype, h.device)
        if key not in vectors:
            vectors[key] = (site_edit.constant_change() @ unit).to(device=h.device, dtype=h.dtype)
        return h + vectors[key]

    return hook


class _PlanTracker(CallTracker):
    """Runs each call of the model with its state at hand, where edits depend on tokens, prompts or readings."""

    def __init__(self, plan: _Plan, active: _ActivePlans):
        self.plan, self.active = plan, active
        from_the_end = (edit.positions for one in plan.site_edits for edit in one.edits if edit.counts_from_end)
        self.prompts = PromptTracker(next(from_the_end, None))  # pyright: ignore[reportArgumentType]
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

    def forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one forward pass of the model."""
        if self.active.paused:
            return forward(*args, **kwargs)
        _refuse_checkpointing(self.plan.dense.model)
        call = parse_call(self.plan.dense.model, args, kwargs)
        if call.logits_by_index and self.plan.edits_head_input:
            raise ValueError("logits_to_keep must be an integer when an edit changes the input of the unembedding")
        span = self.prompts.locate(call)
        readings, companion_cache = self._read(call)
        with self.current.running(CallState(span, readings)):
            output = forward(*args, **kwargs)
        for cache in {call.cache, *returned_caches(output)} - {None}:
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
        with _unedited(self.plan.dense) if same else nullcontext():
            return self.reader.read(call, separate)

    def _needs_separate_run(self, site_edit: SiteEdit) -> bool:
        """Whether the stream at the site may be edited already when the encoder could read it on its way."""
        first = site_edit is self.plan.site_edits[0] and len(self.active) == 1
        return self.plan.source == "sparse" or not first


def _refuse_checkpointing(model: nn.Module) -> None:
    """Raises ValueError if the backward pass would run layers again, when what the edits need of the call is gone."""
    if not (model.training and torch.is_grad_enabled()):
        return
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            f"model={type(model).__name__} has gradient checkpointing on, which runs layers again after the call; "
            "edits that depend on the tokens cannot follow that: call model.gradient_checkpointing_disable(), or use "
            "edits that add one number everywhere"
        )
