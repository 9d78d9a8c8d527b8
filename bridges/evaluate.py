"""evaluate(): the held-out figures of a bridge set, each with its controls (method, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bridges.bridge import BridgeSet
from bridges.bridge_report import BridgeReport, SiteFigures
from bridges.data.prepare import heldout_rows
from bridges.models.loading import as_residual
from bridges.models.modes import eval_mode
from bridges.models.residual import Batch, ResidualModel
from bridges.objective.hybrid import (
    ModelPair,
    Side,
    Traces,
    batch_moments,
    ce_sum,
    empty_moments,
    kl_from_dense,
    residuals_at,
    run_path,
    single_switch_path,
    squared_errors,
    trace_pair,
)
from bridges.objective.normalizers import Normalizers, combine_moments, counted_tokens, nmse
from bridges.objective.sums import Reduce, Sums, no_reduce
from bridges.ops.abs_topk import abs_topk


def evaluate(
    dense: nn.Module | ResidualModel | str | Path,
    sparse: nn.Module | ResidualModel | str | Path,
    bridge_set: BridgeSet,
    data: Any,
    *,
    tokenizer: Any = None,
    batch_size: int = 16,
    check_models: bool = True,
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
        check_models: whether to refuse models that the bridges were not fitted to.

    Returns:
        The report: figures per site and over all sites.

    Raises:
        ValueError: the bridges were fitted to other models, or the data do not fit the models.
        OSError: no model or text is found at a path or hub id.

    >>> import bridges
    >>> pair = bridges.load_pair()
    >>> ids = torch.randint(1024, (64, 32), generator=torch.Generator().manual_seed(0))
    >>> bridge_set = bridges.fit(pair.dense, pair.sparse, ids, steps=0, progress=False, sites=("0.mlp",))
    >>> report = bridges.evaluate(pair.dense, pair.sparse, bridge_set, ids[:4])
    >>> report.tokens
    128
    >>> 0 < report.mean["nmse_decode"] < 1
    True
    """
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be a whole number of rows, at least 1")
    pair = ModelPair(as_residual(dense), as_residual(sparse), bridge_set)
    if check_models:
        bridge_set.check_models(pair.dense.model, pair.sparse.model)
    seq_len = bridge_set.provenance.get("fit", {}).get("seq_len") if isinstance(data, str | PathLike) else None
    rows = heldout_rows(pair.dense, pair.sparse, data, tokenizer, (dense, sparse), seq_len)
    return measure(pair, rows.in_order(batch_size), settings=bridge_set.provenance.get("fit", {}))


@torch.no_grad()
def measure(
    pair: ModelPair, batches: Sequence[Batch], reduce: Reduce = no_reduce, settings: dict[str, Any] | None = None
) -> BridgeReport:
    """The report on the batches of all processes, of which this one may have none; models run in evaluation mode."""
    with eval_mode(pair.dense.model), eval_mode(pair.sparse.model):
        moments = [batch_moments(pair, trace_pair(pair, *batch)) for batch in batches]
        normalizers = combine_moments(moments or [empty_moments(pair)], reduce)
        sums = FigureSums.zeros(len(pair.bridge_set))
        for batch in batches:
            _add_batch(sums, pair, trace_pair(pair, *batch), normalizers)
    return _report(pair.bridge_set.sites, sums.reduced(reduce), normalizers, settings or {})


@dataclass
class FigureSums(Sums):
    """The numerators of a report's figures, float64 on the CPU."""

    error_encode: Float[Tensor, " n_sites"]
    """sum |p - t|^2 over counted tokens and channels, p = f(h_dense) and t = h_sparse."""
    error_encode_floor: Float[Tensor, " n_sites"]
    """The same with p = AbsTopK(h_sparse)."""
    error_decode: Float[Tensor, " n_sites"]
    """The same with p = g(h_sparse) and t = h_dense."""
    error_from_mean: Float[Tensor, " n_sites"]
    """sum |g(h_sparse) - mean of h_dense|^2, for nmse_decode_shuffled."""
    kl_dense_to_sparse: Float[Tensor, " n_sites"]
    """KL from the dense model's prediction, over real tokens; of four passes per site."""
    kl_sparse_to_dense: Float[Tensor, " n_sites"]
    kl_dense_to_sparse_mean_ablation: Float[Tensor, " n_sites"]
    kl_sparse_to_dense_mean_ablation: Float[Tensor, " n_sites"]
    ce_dense_to_sparse: Float[Tensor, " n_sites"]
    """Next-token cross-entropy of the same passes."""
    ce_sparse_to_dense: Float[Tensor, " n_sites"]
    ce_dense_to_sparse_mean_ablation: Float[Tensor, " n_sites"]
    ce_sparse_to_dense_mean_ablation: Float[Tensor, " n_sites"]
    dense_ce: Float[Tensor, ""]
    """Next-token cross-entropy of both models by themselves, and the KL between them."""
    sparse_ce: Float[Tensor, ""]
    kl_sparse_alone: Float[Tensor, ""]

    @classmethod
    def zeros(cls, n_sites: int) -> FigureSums:
        """The sums over no batch."""
        shapes = [(n_sites,)] * 12 + [()] * 3
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))


def _add_batch(sums: FigureSums, pair: ModelPair, traces: Traces, normalizers: Normalizers) -> None:
    """Add one batch to every sum."""
    for i in range(len(pair.bridge_set)):
        _add_reconstruction(sums, pair, traces, i, normalizers.mean_dense[i])
        _add_hybrids(sums, pair, traces, i, normalizers)
    sums.dense_ce += ce_sum(traces, traces.dense.logits).item()
    sums.sparse_ce += ce_sum(traces, traces.sparse.logits).item()
    sums.kl_sparse_alone += kl_from_dense(traces, traces.sparse.logits).item()


def _add_reconstruction(sums: FigureSums, pair: ModelPair, traces: Traces, i: int, mean_dense: Tensor) -> None:
    encode, decode = squared_errors(pair, traces, i)
    bridge, context = pair.bridge_set[i], traces.dense.context
    counted = counted_tokens(context.input_ids, context.attention_mask)
    h_sparse = residuals_at(pair, traces, i)[1]
    h_sparse = h_sparse[counted.to(h_sparse.device)].to(bridge.decoder_weight.dtype)
    sums.error_encode[i] += encode.item()
    sums.error_encode_floor[i] += (abs_topk(h_sparse, bridge.k) - h_sparse).square().sum().item()
    sums.error_decode[i] += decode.item()
    sums.error_from_mean[i] += (bridge.decode(h_sparse) - mean_dense.to(h_sparse)).square().sum().item()


def _add_hybrids(sums: FigureSums, pair: ModelPair, traces: Traces, i: int, normalizers: Normalizers) -> None:
    """Add the KL and the cross-entropy of four passes: both hybrid passes, and both tails under mean ablation."""

    def ablated(side: Side, means: Tensor) -> Tensor:
        """Logits of a model whose stream at the site is its mean at every token."""
        model, trace, site = pair.model(side), traces.side(side), pair.site(side, i)
        mean = means[i].to(trace.residuals[site]).expand_as(trace.residuals[site])
        return model.tail(site, mean, trace.context)

    def bridged(start: Side) -> Tensor:
        return run_path(pair, traces, single_switch_path(len(pair.bridge_set), i, start))

    def add(kl: Tensor, ce: Tensor, logits: Tensor) -> None:
        kl[i] += kl_from_dense(traces, logits).item()
        ce[i] += ce_sum(traces, logits).item()

    add(sums.kl_dense_to_sparse, sums.ce_dense_to_sparse, bridged("dense"))
    add(sums.kl_sparse_to_dense, sums.ce_sparse_to_dense, bridged("sparse"))
    add(
        sums.kl_dense_to_sparse_mean_ablation,
        sums.ce_dense_to_sparse_mean_ablation,
        ablated("sparse", normalizers.mean_sparse),
    )
    add(
        sums.kl_sparse_to_dense_mean_ablation,
        sums.ce_sparse_to_dense_mean_ablation,
        ablated("dense", normalizers.mean_dense),
    )


def _report(sites: list[str], sums: FigureSums, normalizers: Normalizers, settings: dict[str, Any]) -> BridgeReport:
    tokens, predictions = normalizers.tokens.cpu(), normalizers.predictions.cpu()
    variance_dense, variance_sparse = normalizers.variance_dense.cpu(), normalizers.variance_sparse.cpu()
    dense_ce = sums.dense_ce / predictions

    def recovered(ce: Tensor, ce_ablated: Tensor) -> Tensor:
        """1 at the dense model's cross-entropy, 0 at that of mean ablation; NaN where both are equal."""
        ce, ce_ablated = ce / predictions, ce_ablated / predictions
        return torch.where(ce_ablated != dense_ce, (ce_ablated - ce) / (ce_ablated - dense_ce), torch.nan)

    figures = {
        "nmse_encode": nmse(sums.error_encode, variance_sparse),
        "nmse_encode_floor": nmse(sums.error_encode_floor, variance_sparse),
        "nmse_decode": nmse(sums.error_decode, variance_dense),
        # The mean over all pairings of predictions p with targets t: |p - t|^2 sums to |p - m|^2 + |t - m|^2.
        "nmse_decode_shuffled": nmse(sums.error_from_mean + variance_dense, variance_dense),
        "kl_dense_to_sparse": sums.kl_dense_to_sparse / tokens,
        "kl_sparse_to_dense": sums.kl_sparse_to_dense / tokens,
        "kl_dense_to_sparse_mean_ablation": sums.kl_dense_to_sparse_mean_ablation / tokens,
        "kl_sparse_to_dense_mean_ablation": sums.kl_sparse_to_dense_mean_ablation / tokens,
        "ce_recovered_dense_to_sparse": recovered(sums.ce_dense_to_sparse, sums.ce_dense_to_sparse_mean_ablation),
        "ce_recovered_sparse_to_dense": recovered(sums.ce_sparse_to_dense, sums.ce_sparse_to_dense_mean_ablation),
    }
    rows = zip(*(values.tolist() for values in figures.values()), strict=True)
    return BridgeReport(
        sites=tuple(
            SiteFigures(site, **dict(zip(figures, row, strict=True))) for site, row in zip(sites, rows, strict=True)
        ),
        dense_ce=dense_ce.item(),
        sparse_ce=(sums.sparse_ce / predictions).item(),
        kl_sparse_alone=(sums.kl_sparse_alone / tokens).item(),
        tokens=int(tokens),
        settings=settings,
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """The versions that figures depend on."""
    return {name: version(name) for name in ("sparse-bridges", "torch", "transformers")}
