"""What a fit is about to do and roughly what it costs, as text that is shown before it starts."""

from __future__ import annotations

from bridges.config import FitConfig
from bridges.objective.hybrid import ModelPair


def describe(pair: ModelPair, config: FitConfig, rows: int, seq_len: int, heldout_rows: int, world_size: int) -> str:
    """Sites, parameters, tokens, memory and cost of a fit, one line each; memory and cost to an order of magnitude."""
    n = len(pair.bridge_set)
    n_bridge = sum(p.numel() for p in pair.bridge_set.parameters())
    n_sparse = sum(p.numel() for p in pair.sparse.model.parameters())
    n_dense = sum(p.numel() for p in pair.dense.model.parameters())
    batch = config.batch_size * config.gradient_accumulation_steps * world_size
    sampled = n if config.sites_per_step == "all" else min(config.sites_per_step, n)
    tokens = config.steps * batch * seq_len
    trains = config.train_sparse
    # 2 FLOPs per parameter and token forward, 4 backward. A tail is on average half a model, and its backward runs
    # through the activations alone (2) unless the weights train too (4).
    tails = sampled / 2 * (4 * n_dense + (6 if trains else 4) * n_sparse)
    per_token = 2 * n_dense + (6 if trains else 2) * n_sparse + 6 * n_bridge + tails
    start_tokens = min(config.closed_form_tokens, rows * seq_len) if config.closed_form else 0
    closed = start_tokens * (2 * (n_dense + n_sparse) + n * 2 * _moment_size(pair))
    pairs_of_rows = min(config.interchange_pairs, rows) if config.interchange_weight else 0
    closed += pairs_of_rows * seq_len * 6 * (n_dense + n_sparse)  # both rows forward, one of them backward
    width = pair.dense.d_model + pair.sparse.d_model
    streams = 4 * config.batch_size * seq_len * (n * width + 4 * pair.dense.vocab_size)
    state = 4 * (4 * n_bridge + (4 * n_sparse if trains else 0))
    pairs = ", ".join(
        sparse if dense == sparse else f"{dense}={sparse}" for dense, sparse in pair.bridge_set.site_pairs
    )
    start = f"closed form from {_si(start_tokens)} tokens" if config.closed_form else "random start"
    start += f" and {pairs_of_rows} pairs of rows" if pairs_of_rows else ""
    lines = [
        f"bridges: {n} sites ({pairs}), widths {pair.dense.d_model} and {pair.sparse.d_model}, "
        f"k = {pair.bridge_set[0].k}",
        f"parameters: {_si(n_bridge)} in bridges; models {_si(n_dense)} dense (frozen), {_si(n_sparse)} sparse "
        f"({'training' if trains else 'frozen'})",
        f"data: {rows} rows of {seq_len} tokens, {heldout_rows} more held out",
        f"{start}, then {config.steps} steps of {batch} rows = {_si(tokens)} tokens, {sampled} of {n} sites a step",
        f"memory: about {_bytes(state)} for parameters, gradients and optimiser, {_bytes(streams)} for streams, logits",
        f"cost: about {_si(closed + tokens * per_token)}FLOP over {world_size} process(es)",
    ]
    return "\n".join(lines)


def _moment_size(pair: ModelPair) -> int:
    d, s = pair.dense.d_model, pair.sparse.d_model
    return d * d + s * s + d * s


def _si(value: int | float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if size > 1e6 else f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def _bytes(value: int | float) -> str:
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
