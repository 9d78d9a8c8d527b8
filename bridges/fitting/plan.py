"""What a fit is about to do and what it costs, as text that is shown before it starts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from bridges.bridge import BridgeSet
from bridges.config import FitConfig
from bridges.data.random_state import preserve_random_state
from bridges.fitting.channel_effects import EFFECT_TOKENS
from bridges.fitting.closed_form import bytes_per_site, site_groups
from bridges.fitting.massive import SAMPLED_TOKENS
from bridges.fitting.selection import KL_SITES, interval
from bridges.fitting.selection import TOKENS as SELECTION_TOKENS
from bridges.fitting.timings import Timings
from bridges.io.amounts import about, count, duration, memory
from bridges.models.tokens import Batch
from bridges.objective.pair import ModelPair

MOST_NAMED = 12
"""Pairs of sites that the plan names; of more it names the first and the last."""
TIMED_TOKENS = 512
"""Tokens that every part is timed on."""


class Work(NamedTuple):
    """How much a fit will do, in this process."""

    train_rows: int
    seq_len: int
    heldout_rows: int
    """Rows that the NMSEs are measured on."""
    kl_rows: int
    """Rows that the KLs are measured on."""
    start_rows: int
    """Rows of the closed form, with those that judge it; 0 where there is none to do."""
    evaluations: int
    """Held-out evaluations that are left, the last one included."""
    world_size: int = 1
    real_share: float = 1.0
    """Part of the training rows' tokens that is not padding."""
    standardization_tokens: int = 0
    """Tokens that a random start takes means and deviations from."""
    read_scale_tokens: int = 0
    """Tokens that R is measured on where the closed form does not do so."""
    steps_done: int | None = None
    """Steps that a resumed run has behind it; None for a run that starts."""

    @property
    def resumed(self) -> bool:
        """Whether the run has its start, and maybe steps, behind it."""
        return self.steps_done is not None

    def real_tokens(self, rows: int) -> int:
        """About how many tokens of so many training rows are not padding."""
        return round(rows * self.seq_len * self.real_share)


def describe(pair: ModelPair, config: FitConfig, work: Work, seconds: dict[str, float]) -> str:
    """Sites, parameters, data, memory and time of a fit, one line each; memory to an order of magnitude."""
    n = len(pair.bridge_set)
    n_bridge = sum(p.numel() for p in pair.bridge_set.parameters())
    n_sparse = sum(p.numel() for p in pair.sparse.model.parameters())
    n_dense = sum(p.numel() for p in pair.dense.model.parameters())
    batch = config.batch_size * config.gradient_accumulation_steps * work.world_size
    sampled = sampled_sites(config, n)
    trains = config.train_sparse
    width = pair.dense.d_model + pair.sparse.d_model
    streams = 4 * config.batch_size * work.seq_len * (n * width + pair.dense.vocab_size)  # the target's logits alone
    state = 4 * (7 * n_bridge + (4 * n_sparse if trains else 0))
    solves = config.closed_form and not work.resumed
    moments = min(config.moments_bytes, n * bytes_per_site(pair)) if solves else 0
    left = config.steps - (work.steps_done or 0)
    padding = f" ({count(work.real_tokens(work.train_rows))} tokens without padding)" if work.real_share < 1 else ""
    lines = [
        f"bridges: {n} sites ({_site_names(pair.bridge_set)}), widths {pair.dense.d_model} and {pair.sparse.d_model}, "
        f"k = {pair.bridge_set[0].k}",
        f"parameters: {count(n_bridge)} in bridges; models {count(n_dense)} dense (frozen), {count(n_sparse)} sparse "
        f"({'training' if trains else 'frozen'})",
        f"data: {work.train_rows} rows of {work.seq_len} tokens{padding}, {work.heldout_rows} more held out, "
        f"{work.kl_rows} of them for the KLs",
        f"{_start(config, work)}, then {left} steps of {batch} rows = {count(work.real_tokens(left * batch))} tokens, "
        f"{sampled} of {n} sites a step",
        f"memory: about {memory(state)} for parameters, gradients and optimiser, {memory(streams)} for streams and "
        f"logits, {memory(moments)} for moments",
        f"time: {about(sum(seconds.values()))} on this machine ("
        + ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
        + ")",
    ]
    return "\n".join(lines)


def _start(config: FitConfig, work: Work) -> str:
    """What comes before the first step."""
    if work.resumed:
        return f"resumes at step {work.steps_done}"
    if not config.closed_form:
        return "random start"
    return f"closed form from {count(work.real_tokens(work.start_rows))} tokens"


def estimate_seconds(
    pair: ModelPair,
    config: FitConfig,
    work: Work,
    batch: Batch,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, float]:
    """Seconds of every part of a fit, from timing a small piece of each on a `batch` of its rows.

    Nothing is changed: the bridges may hold anything, and gradients are cleared.
    """
    n = len(pair.bridge_set)
    ids, mask = batch
    rows = max(1, TIMED_TOKENS // ids.shape[1])
    small: Batch = (ids[:rows], None if mask is None else mask[:rows])
    with autocast(), preserve_random_state():
        part = Timings.measure(pair, config, small)
    per_token = 1 / small[0].numel()
    found: dict[str, float] = {}
    if config.closed_form and not work.resumed:
        found["closed form"] = _closed_form_seconds(pair, config, work, part, per_token)
    if scales := _scales_seconds(pair, config, work, part, per_token):
        found["scales of the streams"] = scales
    left = config.steps - (work.steps_done or 0)
    if left:
        # A path through both models costs about what the two hybrid passes of a site do.
        sites = sampled_sites(config, n) + int(config.path_weight > 0 and n > 1)
        batch_tokens = config.batch_size * config.gradient_accumulation_steps * work.seq_len
        # What several micro-batches are divided by takes a forward pass of its own over each.
        forward = part.forward if config.gradient_accumulation_steps > 1 else 0.0
        step = batch_tokens * per_token * (forward + part.step_base + sites * part.step_site) + n * part.update
        found["steps"] = left * step
        if not config.train_sparse:
            most = SELECTION_TOKENS / work.real_share
            tokens = min(most, work.train_rows * work.seq_len) / work.world_size
            once = part.streams + n * part.reconstruction + min(KL_SITES, n) * part.hybrids / 2
            times = -(-left // interval(config.steps)) + (not work.resumed)
            found["choosing the best state"] = times * tokens * per_token * once
    nmse_tokens, kl_tokens = (rows * work.seq_len / work.world_size for rows in (work.heldout_rows, work.kl_rows))
    found["evaluation"] = work.evaluations * (
        nmse_tokens * per_token * (part.streams + n * part.reconstruction)
        + kl_tokens * per_token * (part.streams + n * part.hybrids)
    )
    return found


def _closed_form_seconds(pair: ModelPair, config: FitConfig, work: Work, part: Timings, per_token: float) -> float:
    n, groups = len(pair.bridge_set), len(list(site_groups(pair, config.moments_bytes)))
    rows = work.start_rows / work.world_size
    run, counted = rows * work.seq_len, rows * work.seq_len * work.real_share
    for_medians = SAMPLED_TOKENS / work.real_share
    seconds = (groups * run + for_medians) * per_token * part.streams
    for_effects = min(EFFECT_TOKENS / work.real_share, work.train_rows * work.seq_len) / work.world_size
    seconds += for_effects * per_token * part.effects
    return seconds + counted * per_token * n * part.moments + n * part.solve


def _scales_seconds(pair: ModelPair, config: FitConfig, work: Work, part: Timings, per_token: float) -> float:
    """What a random start is standardised by, and what is measured again where the closed form's scales do not hold."""

    def run(tokens: int) -> float:
        """Tokens of this process, padding included, that hold so many real ones of all."""
        return min(tokens / work.real_share, work.train_rows * work.seq_len) / work.world_size

    seconds, for_medians = 0.0, SAMPLED_TOKENS / work.real_share
    if not config.closed_form and not work.resumed:
        tokens, groups = run(work.standardization_tokens), len(list(site_groups(pair, config.moments_bytes)))
        counted = tokens * work.real_share * len(pair.bridge_set)
        seconds += per_token * ((groups * tokens + for_medians) * part.streams + counted * part.moments)
    if config.train_sparse or not config.closed_form:
        tokens = run(work.read_scale_tokens) + (for_medians if config.train_sparse else 0)
        seconds += per_token * tokens * part.streams
    return seconds


def sampled_sites(config: FitConfig, n_sites: int) -> int:
    """Sites whose KLs are computed in a step."""
    return n_sites if config.sites_per_step == "all" else min(config.sites_per_step, n_sites)


def _site_names(bridge_set: BridgeSet) -> str:
    names = [sparse if dense == sparse else f"{dense}={sparse}" for dense, sparse in bridge_set.site_pairs]
    return ", ".join(names) if len(names) <= MOST_NAMED else f"{', '.join(names[:3])}, ..., {names[-1]}"
