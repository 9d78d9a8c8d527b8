"""steer(): inside it, an ordinary Hugging Face model runs with edits of sparse channels pushed into it.

Read: the sublayer's input, after the norm. Reading: the value of a channel in the read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bridges.bridge import BridgeSet
from bridges.models.loading import as_residual
from bridges.models.modes import refuse_recomputation, uncompiled
from bridges.models.residual import HookFunction, ResidualModel
from bridges.models.wrapped import inner_model
from bridges.steering.call_state import change_hook, encode_hook
from bridges.steering.companion import model_lock
from bridges.steering.delta import EntryPoint
from bridges.steering.edits import Edit, SiteEdit, as_edit_list, check_edits
from bridges.steering.plan import ActivePlans, Plan, Source, active_plans, build_plan, listed, unedited
from bridges.steering.registry import register
from bridges.steering.trackers import ConstantTracker, PlanTracker


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
    ids; the context yields the dense model. A module that wraps a model (PEFT, `DataParallel`) stands for the language
    model inside it. Inside, its forward passes and `generate` work as usual: with a (dynamic) cache or without, greedy,
    sampled or with beams, padded on either side. What torch.compile compiled runs uncompiled. Contexts nest; edits of
    one channel apply in order. Strength 0 or no edits install nothing and change no bit.

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
    share a sparse one. Gradient checkpointing leaves out the layers that are edited: the backward pass, which may come
    after the context, does not run them again. Inside a `torch.utils.checkpoint` of your own a call raises ValueError;
    with its `use_reentrant=True` no call can tell, so keep the backward pass inside the context there.

    Edits that add one number everywhere go with any call. Others raise ValueError, naming the argument, for calls whose
    tokens cannot be told: static caches and those without a length (Mamba), packed rows, `inputs_embeds`, continuous
    batching.

    Raises ValueError, before anything is changed, for edits that the bridges cannot carry over, and for models other
    than those the bridges were fitted to (unless `check_models` is False), at strength 0 too.

    >>> import bridges, torch
    >>> pair, bridge_set = bridges.load_pair(), bridges.load_bridges()
    >>> ids = torch.randint(1024, (1, 16), generator=torch.Generator().manual_seed(0))
    >>> with steer(pair.dense, bridge_set, Edit("0.mlp", 753, 2.0, "add")) as dense, torch.no_grad():
    ...     steered = dense(ids).logits  # [1, 16, 1024]
    >>> torch.equal(steered, pair.dense(ids).logits)
    False
    """
    edits = as_edit_list(edits)
    for name, value, known in (("at", at, get_args(EntryPoint)), ("source", source, get_args(Source))):
        if value not in known:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")
    check_edits(bridge_set, edits, strength)
    inner, given_sparse = _module(dense), None if sparse is None else _module(sparse)
    with unedited(inner):  # outer edits are off while the model is decomposed
        residual_model, sparse_residual = as_residual(dense), None
        if sparse is not None:
            with model_lock(given_sparse):
                sparse_residual = as_residual(sparse)
        if check_models:
            bridge_set.check_models(residual_model.model, None if sparse_residual is None else sparse_residual.model)
        plan = build_plan(residual_model, sparse_residual, bridge_set, edits, strength, at, source)
    steered = dense if isinstance(dense, nn.Module) else residual_model.model
    with _installed(plan) if edits and strength != 0 else nullcontext():
        yield steered


def _module(model: nn.Module | ResidualModel | str | Path) -> nn.Module | str | Path:
    """The innermost language model of an object; a folder or hub id as it is."""
    model = model.model if isinstance(model, ResidualModel) else model
    return inner_model(model) if isinstance(model, nn.Module) else model


@contextmanager
def _installed(plan: Plan) -> Iterator[None]:
    """Inside, the model runs with the edits."""
    model, active = plan.dense.model, active_plans(plan.dense.model)
    tracker = ConstantTracker(plan, active) if plan.constant else PlanTracker(plan, active)
    with uncompiled(), ExitStack() as stack:
        stack.callback(tracker.close)
        stack.enter_context(register(model, tracker))
        stack.enter_context(listed(plan, active))
        for site_edit in plan.site_edits:
            for hook in _hooks(plan, site_edit, active, tracker):
                stack.enter_context(hook)
        yield


def _hooks(
    plan: Plan, site_edit: SiteEdit, active: ActivePlans, tracker: ConstantTracker
) -> Iterator[AbstractContextManager[None]]:
    """The hooks of one site: they add its edits to the stream, or to what each module reads of it."""

    def unless_paused(hook: HookFunction) -> HookFunction:
        def run(h: Tensor) -> Tensor | None:
            if active.paused:
                return None
            refuse_recomputation()
            return hook(h)

        return run

    def add(unit: Tensor) -> HookFunction:
        if site_edit.constant or not isinstance(tracker, PlanTracker):
            return _constant_hook(site_edit, unit)
        return change_hook(site_edit, unit, tracker.current)

    add_to_stream = add(site_edit.to_stream) if plan.at == "residual" else None
    if isinstance(tracker, PlanTracker) and plan.source == "encoder" and site_edit.reading_mode:
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
