"""evaluate(): the held-out figures of a bridge set, each with its controls (method, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bridges.bridge import BridgeSet
from bridges.bridge_report import BridgeReport, PathFigures, SiteFigures
from bridges.data.prepare import heldout_rows
from bridges.io.progress import progress_bar, tracked
from bridges.models.loading import as_residual
from bridges.models.modes import eval_mode
from bridges.models.residual import ResidualModel
from bridges.models.tokens import Batch
from bridges.objective.hybrid import random_path
from bridges.objective.hybrid_figures import PASSES, Hybrids
from bridges.objective.normalizers import nmse
from bridges.objective.pair import SIDES, ModelPair, Side, trace_pair
from bridges.objective.reconstruction import Reconstruction
from bridges.objective.sums import Reduce, no_reduce


def evaluate(
    dense: nn.Module | ResidualModel | str | Path,
    sparse: nn.Module | ResidualModel | str | Path,
    bridge_set: BridgeSet,
    data: Any,
    *,
    tokenizer: Any = None,
    batch_size: int = 16,
    kl_tokens: int | Literal["auto"] = "auto",
    paths: int | Sequence[str | Sequence[Side]] = (),
    check_models: bool = True,
    progress: bool = True,
) -> BridgeReport:
    """Measure a bridge set on held-out data (method, section 2).

    Every figure is one sum over the whole data divided by another, never a mean over batches.

    Args:
        dense: the dense model: a model object, a `ResidualModel`, a folder or a hub id.
        sparse: the sparse model, given in the same ways. Both run in evaluation mode and are left in their own.
        bridge_set: the bridges between them.
        data: token ids [n, seq]; a finite iterable of such batches, or of dicts with `input_ids` and `attention_mask`;
            or a path to text files.
        tokenizer: turns text into tokens; by default the one saved with a model.
        batch_size: rows per forward pass; it does not change the figures.
        kl_tokens: tokens that KLs and cross-entropies are measured on, rounded up to whole rows from the first on;
            NMSEs are measured on all. By default as many as a budget of computation allows: every token of a small
            model pair, a few hundred where there are sixty sites. The report says how many, with the standard error.
        paths: hybrid passes that change sides as often as they like, whose KLs the report gives in `paths`: each
            path names, for every bridged site, the side that runs before it, and at last the side that runs to the
            logits, as words or as first letters ("dsds" for three sites). A number: so many random paths of two and
            more changes, the same ones every time.
        check_models: whether to refuse models that the bridges were not fitted to.
        progress: whether to show progress bars.

    Returns:
        The report: figures per site and over all sites.

    Raises:
        ValueError: the bridges were fitted to other models, or the data do not fit the models.
        OSError: no model or text is found at a path or hub id.

    >>> import bridges
    >>> pair = bridges.load_pair()
    >>> ids = torch.randint(1024, (64, 32), generator=torch.Generator().manual_seed(0))
    >>> bridge_set = bridges.fit(pair.dense, pair.sparse, ids, steps=0, ridge=0.1, sites=("0.mlp",), progress=False)
    >>> report = bridges.evaluate(pair.dense, pair.sparse, bridge_set, ids[:4])
    >>> report.tokens
    128
    >>> 0 < report.mean["nmse_decode"] < 1
    True
    """
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be a whole number of rows, at least 1")
    if kl_tokens != "auto" and (not isinstance(kl_tokens, Integral) or kl_tokens < 1):
        raise ValueError(f"kl_tokens={kl_tokens!r} must be a whole number of tokens, at least 1, or 'auto'")
    pair = ModelPair(as_residual(dense), as_residual(sparse), bridge_set)
    if check_models:
        bridge_set.check_models(pair.dense.model, pair.sparse.model)
    seq_len = bridge_set.provenance.get("fit", {}).get("seq_len") if isinstance(data, str | PathLike) else None
    checked_paths = _paths(paths, len(bridge_set))
    rows = heldout_rows(pair.dense, pair.sparse, data, tokenizer, (dense, sparse), seq_len)
    auto = kl_tokens == "auto"
    n_rows = affordable_kl_rows(pair, len(rows), rows.seq_len) if auto else rows.rows_holding(kl_tokens)
    return measure(
        pair,
        rows.in_order(batch_size),
        settings=bridge_set.provenance.get("fit", {}),
        kl_batches=rows.first(n_rows).in_order(batch_size),
        progress=progress,
        selection=None if bridge_set.report is None else bridge_set.report.selection,
        paths=checked_paths,
    )


def _paths(paths: int | Sequence[str | Sequence[Side]], n_sites: int) -> list[tuple[Side, ...]]:
    """The paths as sides; ValueError for those that do not fit the bridged sites."""
    if isinstance(paths, int):
        if paths < 0:
            raise ValueError(f"paths={paths} must be a number of paths, at least 0, or a list of paths")
        if paths and n_sites < 2:
            raise ValueError(f"paths={paths} needs two bridged sites or more, so that a path can change sides twice")
        generator = torch.Generator().manual_seed(0)
        return [random_path(n_sites, 2 + j % (n_sites - 1), generator) for j in range(paths)]
    sides: dict[str, Side] = {"d": "dense", "dense": "dense", "s": "sparse", "sparse": "sparse"}
    for path in paths:
        if len(path) != n_sites + 1 or not set(path) <= sides.keys():
            raise ValueError(
                f"paths={path!r} must name {n_sites + 1} sides, 'dense' or 'sparse' or their first letters: one before "
                f"each of the {n_sites} bridged sites, and one to the logits"
            )
    return [tuple(sides[side] for side in path) for path in paths]


@torch.no_grad()
def measure(
    pair: ModelPair,
    batches: Sequence[Batch],
    reduce: Reduce = no_reduce,
    settings: dict[str, Any] | None = None,
    *,
    kl_batches: Sequence[Batch] | None = None,
    progress: bool = False,
    selection: dict[str, float | int] | None = None,
    paths: Sequence[tuple[Side, ...]] = (),
) -> BridgeReport:
    """The report on the batches of all processes, of which this one may have none; models run in evaluation mode.

    `kl_batches`: those that KLs and cross-entropies are measured on; by default all of them. `selection`: what the
    report says of the state that `fit` has selected. `paths`: hybrid passes along other paths.
    """
    kl_batches = batches if kl_batches is None else kl_batches
    with eval_mode(pair.dense.model), eval_mode(pair.sparse.model):
        streams = Reconstruction(pair)
        for batch in tracked(batches, "NMSE, batches of held-out rows", shown=progress):
            streams.add(trace_pair(pair, *batch, logits=()))
        streams = streams.reduced(reduce)
        hybrids = Hybrids(pair, streams.means(), paths)
        steps = len(kl_batches) * (len(pair.bridge_set) + len(paths))
        with progress_bar("KL, sites and batches", steps, progress) as bar:
            for batch in kl_batches:
                for _ in hybrids.add(trace_pair(pair, *batch, logits=("dense",))):
                    bar.advance()
    return _report(pair.bridge_set.sites, streams, hybrids.reduced(reduce), settings or {}, selection)


MIN_KL_ROWS = 4
KL_FLOP = {"cpu": 2e13}
"""Computation for the KLs and their controls where their number of tokens is not given, by type of device."""
KL_FLOP_ELSEWHERE = 2e15


def affordable_kl_rows(pair: ModelPair, rows: int, seq_len: int) -> int:
    """How many of the rows KLs are measured on: as many as `KL_FLOP` allows, at least four where there are so many."""
    budget = KL_FLOP.get(pair.dense.device.type, KL_FLOP_ELSEWHERE)
    affordable = int(budget / (hybrid_flop(pair) * seq_len))
    return min(rows, max(affordable, MIN_KL_ROWS))


def hybrid_flop(pair: ModelPair) -> float:
    """Floating-point operations per token of all passes that a report needs: two tails of each model at every site."""
    total = 0.0
    for side in SIDES:
        model = pair.model(side)
        n_parameters = sum(p.numel() for p in model.model.parameters())
        head = model.d_model * model.vocab_size
        body = max(n_parameters - head, 0)
        n_sublayers = len(model.sites) - 1
        for i in range(len(pair.bridge_set)):
            left = (n_sublayers - pair.site(side, i)) / max(n_sublayers, 1)
            total += 2 * 2 * (left * body + head)
    return total


def _report(
    sites: list[str],
    streams: Reconstruction,
    hybrids: Hybrids,
    settings: dict[str, Any],
    selection: dict[str, float | int] | None,
) -> BridgeReport:
    usual, errors, rows = streams.usual, streams.errors, hybrids.rows
    variance = {side: usual[side].variance() for side in SIDES}
    every = {side: usual[side] + streams.massive[side] for side in SIDES}
    variance_all = {side: every[side].variance() for side in SIDES}
    dense_ce = rows.dense_ce / rows.predictions

    def recovered(name: str) -> Tensor:
        """1 at the dense model's cross-entropy, 0 at that of mean ablation; NaN where both are equal."""
        ce, ce_ablated = hybrids.ce(name), hybrids.ce(f"{name}_mean_ablation")
        return torch.where(ce_ablated != dense_ce, (ce_ablated - ce) / (ce_ablated - dense_ce), torch.nan)

    figures = {
        "nmse_encode": nmse(errors.encode, variance["sparse"]),
        "nmse_encode_floor": nmse(errors.floor, variance["sparse"]),
        "nmse_decode": nmse(errors.decode, variance["dense"]),
        # The mean over all pairings of predictions p with targets t: |p - t|^2 sums to |p - m|^2 + |t - m|^2.
        "nmse_decode_shuffled": nmse(
            streams.decoded.squares_about(usual["dense"].mean()) + variance["dense"], variance["dense"]
        ),
        **{f"kl_{name}": hybrids.kl(name) for name in PASSES},
        "ce_recovered_dense_to_sparse": recovered("dense_to_sparse"),
        "ce_recovered_sparse_to_dense": recovered("sparse_to_dense"),
        "massive_share": streams.massive["dense"].tokens / every["dense"].tokens.clamp(min=1),
        "nmse_encode_all_tokens": nmse(errors.encode + errors.encode_massive, variance_all["sparse"]),
        "nmse_decode_all_tokens": nmse(errors.decode + errors.decode_massive, variance_all["dense"]),
        "kl_dense_to_sparse_se": hybrids.kl_standard_error("dense_to_sparse"),
        "kl_sparse_to_dense_se": hybrids.kl_standard_error("sparse_to_dense"),
    }
    table = zip(*(values.tolist() for values in figures.values()), strict=True)
    return BridgeReport(
        sites=tuple(
            SiteFigures(site, **dict(zip(figures, row, strict=True))) for site, row in zip(sites, table, strict=True)
        ),
        dense_ce=dense_ce.item(),
        sparse_ce=(rows.sparse_ce / rows.predictions).item(),
        kl_sparse_alone=(rows.kl_sparse_alone / rows.tokens).item(),
        tokens=int(rows.tokens),
        settings=settings,
        versions=versions(),
        nmse_tokens=int(every["dense"].tokens.max()),
        selection=selection,
        paths=tuple(
            PathFigures("".join(side[0] for side in path), kl)
            for path, kl in zip(hybrids.paths, (hybrids.path_kl / rows.tokens).tolist(), strict=True)
        ),
    )


def versions() -> dict[str, str]:
    """The versions that figures depend on."""
    return {name: version(name) for name in ("sparse-bridges", "torch", "transformers")}
