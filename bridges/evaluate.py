"""evaluate(): a bridge set's held-out figures, each beside its controls (method, section 2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from numbers import Integral
from os import PathLike
from typing import Any

import torch
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
    kl_of,
    residuals_at,
    run_path,
    single_switch_path,
    squared_errors,
    trace_pair,
)
from bridges.objective.normalizers import Normalizers, Reduce, combine_moments, counted_tokens, no_reduce
from bridges.ops.abs_topk import abs_topk


def evaluate(
    dense: nn.Module | ResidualModel,
    sparse: nn.Module | ResidualModel,
    bridge_set: BridgeSet,
    data: Any,
    *,
    tokenizer: Any = None,
    batch_size: int = 16,
    check_models: bool = True,
) -> BridgeReport:
    """Measure a bridge set on held-out `data`: tokens [n, seq], a finite iterable of batches, or a path to text.

    Every figure is one sum over the whole data divided by another. ValueError if the set was fitted to other models,
    unless `check_models` is False.
    """
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be a whole number of rows, at least 1")
    pair = ModelPair(as_residual(dense), as_residual(sparse), bridge_set)
    if check_models:
        bridge_set.check_models(pair.dense.model, pair.sparse.model)
    seq_len = bridge_set.provenance.get("fit", {}).get("seq_len") if isinstance(data, str | PathLike) else None
    sources = (pair.dense.model, pair.sparse.model)
    rows = heldout_rows(pair.dense, pair.sparse, data, tokenizer, sources, seq_len)
    return measure(pair, rows.in_order(batch_size), settings=bridge_set.provenance.get("fit", {}))


@torch.no_grad()
def measure(
    pair: ModelPair, batches: Sequence[Batch], reduce: Reduce = no_reduce, settings: dict[str, Any] | None = None
) -> BridgeReport:
    """The report from this process's batches; sums are taken over all processes. Both models in evaluation mode."""
    with eval_mode(pair.dense.model), eval_mode(pair.sparse.model):
        shares = [batch_moments(pair, trace_pair(pair, *batch)) for batch in batches]
        scale = combine_moments(shares or [empty_moments(pair)], reduce)
        sums = reduce(sum_terms(pair, batches, scale.means))
    return _report(pair, sums, scale, settings or {})


def sum_terms(pair: ModelPair, batches: Iterable[Batch], means: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Numerators of every figure, [n_sites + 1, 12]; the last row holds the models' own."""
    n = len(pair.bridge_set)
    sums = torch.zeros(n + 1, 12, dtype=torch.float64)
    for batch in batches:
        traces = trace_pair(pair, *batch)
        for i in range(n):
            sums[i] += torch.tensor(
                [*_reconstruction(pair, traces, i, means[i][0]), *_hybrids(pair, traces, i, means[i])],
                dtype=torch.float64,
            )
        sparse = traces.sparse.logits
        own = [ce_sum(traces, traces.dense.logits), ce_sum(traces, sparse), kl_of(traces, sparse)]
        sums[n, :3] += torch.tensor([term.double().item() for term in own], dtype=torch.float64)
    return sums


def _reconstruction(pair: ModelPair, traces: Traces, i: int, mean: Tensor) -> list[float]:
    """Numerators of nmse_encode, its floor and nmse_decode; then sum |g(h_s) - mean of h_d|^2, for shuffled tokens."""
    encode, decode = squared_errors(pair, traces, i)
    bridge = pair.bridge_set[i]
    context = traces.dense.context
    counted = counted_tokens(context.input_ids, context.attention_mask)
    h_sparse = residuals_at(pair, traces, i)[1]
    h_sparse = h_sparse[counted.to(h_sparse.device)].to(bridge.decoder_weight.dtype)
    floor = (abs_topk(h_sparse, bridge.k) - h_sparse).square().sum()
    from_mean = (bridge.decode(h_sparse) - mean.to(h_sparse)).square().sum()
    return [term.double().item() for term in (encode, floor, decode, from_mean)]


def _hybrids(pair: ModelPair, traces: Traces, i: int, means: tuple[Tensor, Tensor]) -> list[float]:
    """Numerators of both KLs, both under mean ablation, then of both cross-entropies and those under mean ablation."""
    n = len(pair.bridge_set)
    bridged = [run_path(pair, traces, single_switch_path(n, i, start)) for start in ("dense", "sparse")]
    ablated = []
    sides: list[tuple[int, Side]] = [(1, "sparse"), (0, "dense")]
    for side, start in sides:
        model, trace = pair.model(start), traces.side(start)
        site = pair.site(start, i)
        mean = means[side].to(trace.residuals[site]).expand_as(trace.residuals[site])
        ablated.append(model.tail(site, mean, trace.context))
    logits = (*bridged, *ablated)
    return [term(traces, one).double().item() for term in (kl_of, ce_sum) for one in logits]


def _report(pair: ModelPair, sums: Tensor, scale: Normalizers, settings: dict[str, Any]) -> BridgeReport:
    tokens, predictions = scale.tokens.item(), scale.predictions.item()
    dense_ce, sparse_ce, kl_alone = sums[-1, 0] / predictions, sums[-1, 1] / predictions, sums[-1, 2] / tokens
    sites = []
    for i, name in enumerate(pair.bridge_set.sites):
        var_dense, var_sparse = scale.variance_dense[i].item(), scale.variance_sparse[i].item()
        encode, floor, decode, from_mean, *kls_and_ces = sums[i].tolist()
        kls = [kl / tokens for kl in kls_and_ces[:4]]
        ces = [ce / predictions for ce in kls_and_ces[4:]]
        sites.append(
            SiteFigures(
                name=name,
                nmse_encode=_ratio(encode, var_sparse),
                nmse_encode_floor=_ratio(floor, var_sparse),
                nmse_decode=_ratio(decode, var_dense),
                # The mean over all pairings of predictions p with targets t: |p - t|^2 sums to |p - m|^2 + |t - m|^2.
                nmse_decode_shuffled=_ratio(from_mean + var_dense, var_dense),
                kl_dense_to_sparse=kls[0],
                kl_sparse_to_dense=kls[1],
                kl_dense_to_sparse_mean_ablation=kls[2],
                kl_sparse_to_dense_mean_ablation=kls[3],
                ce_recovered_dense_to_sparse=_recovered(ces[0], ces[2], dense_ce.item()),
                ce_recovered_sparse_to_dense=_recovered(ces[1], ces[3], dense_ce.item()),
            )
        )
    return BridgeReport(
        tuple(sites), dense_ce.item(), sparse_ce.item(), kl_alone.item(), int(tokens), settings, versions()
    )


def _ratio(error: float, variance: float) -> float:
    """NaN where the target does not vary: no prediction of it can be rated."""
    return error / variance if variance else float("nan")


def _recovered(ce: float, ablated: float, dense: float) -> float:
    return (ablated - ce) / (ablated - dense) if ablated != dense else float("nan")


def versions() -> dict[str, str]:
    """The versions that figures depend on."""
    return {name: version(name) for name in ("sparse-bridges", "torch", "transformers")}
