"""The KLs and cross-entropies of a bridge set's hybrid passes, as sums that add up over batches and processes.

They are held-out figures (method, section 2); those over streams are in `bridges.objective.reconstruction`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from bridges.objective.head import logits_of, position_chunks
from bridges.objective.hybrid import (
    ALL_POSITIONS,
    common_logits,
    next_tokens,
    run_path_to_final,
    single_side_path,
    single_switch_path,
)
from bridges.objective.pair import ModelPair, Side, Traces
from bridges.objective.sums import Reduce, Sums, zeros_per_site
from bridges.ops.kl import row_divergence

PASSES = tuple(
    f"{name}{control}" for name in ("dense_to_sparse", "sparse_to_dense") for control in ("", "_mean_ablation")
)
"""The passes that are measured at every site: both hybrids, and both tails under mean ablation."""


@dataclass
class PassSums(Sums):
    """Sums over the rows of one pass per site; K is a row's summed KL, n its real tokens. In nats."""

    kl: Float[Tensor, " n_sites"]
    kl_squared: Float[Tensor, " n_sites"]
    """Of K^2."""
    kl_times_tokens: Float[Tensor, " n_sites"]
    """Of K n."""
    ce: Float[Tensor, " n_sites"]
    """Next-token cross-entropy over the tokens of `predicting_tokens`."""


@dataclass
class RowSums(Sums):
    """Sums over rows that every pass shares; entries are one number each."""

    rows: Float[Tensor, ""]
    tokens: Float[Tensor, ""]
    tokens_squared: Float[Tensor, ""]
    predictions: Float[Tensor, ""]
    dense_ce: Float[Tensor, ""]
    sparse_ce: Float[Tensor, ""]
    kl_sparse_alone: Float[Tensor, ""]


class Hybrids:
    """The KL from the dense model and the cross-entropy of every pass at every site."""

    def __init__(
        self, pair: ModelPair, means: dict[Side, Float[Tensor, "n_sites d"]], paths: Sequence[Sequence[Side]] = ()
    ):
        """`means`: each site's mean stream, for mean ablation. `paths`: further passes."""
        self.pair, self.means, self.paths = pair, means, paths
        self.path_kl = torch.zeros(len(paths), dtype=torch.float64)
        """Summed over tokens, nats."""
        self.passes = {name: zeros_per_site(PassSums, len(pair.bridge_set)) for name in PASSES}
        self.rows = RowSums(*(torch.zeros((), dtype=torch.float64) for _ in fields(RowSums)))

    def add(self, traces: Traces) -> Iterator[int]:
        """Add one batch; yields after every site and path, so that a progress bar can follow."""
        pair, n = self.pair, len(self.pair.bridge_set)
        batch = _Batch(pair, traces)
        for i in range(n):
            for name in PASSES:
                batch.add(self.passes[name], i, *self._to_final(traces, name, i))
            yield i
        for j, path in enumerate(self.paths):
            self.path_kl[j] += batch.figures(path[-1], run_path_to_final(pair, traces, path))[0].sum()
            yield n + j
        batch.add_models(self.rows, run_path_to_final(pair, traces, single_side_path(n, "sparse")))

    def _to_final(self, traces: Traces, name: str, i: int) -> tuple[Side, Float[Tensor, "b s _"]]:
        """The side that a pass ends in, and its stream at `final`."""
        pair = self.pair
        start: Side = "dense" if name.startswith("dense") else "sparse"
        side: Side = "sparse" if start == "dense" else "dense"
        model, trace = pair.model(side), traces.side(side)
        if not name.endswith("_mean_ablation"):
            return side, run_path_to_final(pair, traces, single_switch_path(len(pair.bridge_set), i, start))
        site = pair.site(side, i)
        stream = trace.residuals[site]
        mean = self.means[side][i].to(stream).expand_as(stream)
        return side, model.run(site, len(model.sites) - 1, mean, trace.context)

    def reduced(self, reduce: Reduce) -> Hybrids:
        """The sums over all processes."""
        total = Hybrids(self.pair, self.means, self.paths)
        total.path_kl = reduce(self.path_kl)
        total.passes = {name: sums.reduced(reduce) for name, sums in self.passes.items()}
        total.rows = self.rows.reduced(reduce)
        return total

    def kl(self, name: str) -> Float[Tensor, " n_sites"]:
        """Mean KL per real token."""
        return self.passes[name].kl / self.rows.tokens

    def ce(self, name: str) -> Float[Tensor, " n_sites"]:
        """Mean cross-entropy per predicted token."""
        return self.passes[name].ce / self.rows.predictions

    def kl_standard_error(self, name: str) -> Float[Tensor, " n_sites"]:
        """The standard error of `kl`, as a ratio of two sums over independent rows; NaN for a single row.

        Tokens of one row are not independent, so rows are what is counted (Cochran 1977, Sampling Techniques, 6.3).
        """
        sums, rows, mean = self.passes[name], self.rows, self.kl(name)
        squares = sums.kl_squared - 2 * mean * sums.kl_times_tokens + mean**2 * rows.tokens_squared
        if rows.rows < 2:
            return torch.full_like(mean, torch.nan)
        return (squares.clamp(min=0) * rows.rows / (rows.rows - 1)).sqrt() / rows.tokens


class _Batch:
    """One batch's tokens, and what every pass on it is held against."""

    def __init__(self, pair: ModelPair, traces: Traces):
        self.pair, self.traces = pair, traces
        ids, mask = traces.dense.context.input_ids, traces.dense.context.attention_mask
        self.real: Bool[Tensor, "b s"] = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        self.predicting, self.labels = next_tokens(traces)

    def figures(self, side: Side, stream: Float[Tensor, "b s _"]) -> tuple[Float[Tensor, " b"], Float[Tensor, ""]]:
        """Each row's KL from the dense model, and the cross-entropy, both summed over tokens; float64 on the CPU.

        `stream` is that side's at `final`. The logits of a few tokens exist at a time.
        """
        model = self.pair.model(side)
        context = self.traces.side(side).context
        parts = [
            self._of(logits_of(model, stream, context, positions), positions)
            for positions in position_chunks(model, stream)
        ]
        kls, ces = zip(*parts, strict=True)
        return torch.stack(kls).sum(0).cpu(), torch.stack(ces).sum().cpu()

    def _of(
        self, logits: Float[Tensor, "b kept vocab"], positions: slice = ALL_POSITIONS
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, ""]]:
        """The `figures` of some positions, on the device of the logits."""
        real, predicting, labels = (
            tensor[:, positions].to(logits.device) for tensor in (self.real, self.predicting, self.labels)
        )
        target = self.traces.dense.logits[:, positions].to(logits.device)
        logits = common_logits(self.traces, logits)[real]
        kl, log_normalizer = row_divergence(target[real], logits)
        of_label = logits.gather(1, rearrange(labels[real], "n -> n 1"))[:, 0]
        ce = (log_normalizer - of_label.to(log_normalizer))[predicting[real]].double().sum()
        per_token = torch.zeros(real.shape, dtype=torch.float64, device=logits.device)
        per_token[real] = kl.double()
        return per_token.sum(1), ce

    def add(self, sums: PassSums, site: int, side: Side, stream: Float[Tensor, "b s _"]) -> None:
        """Add one pass at one site, given by the side that it ends in and its stream at `final`."""
        kl, ce = self.figures(side, stream)
        sums.kl[site] += kl.sum()
        sums.kl_squared[site] += kl.square().sum()
        sums.kl_times_tokens[site] += (kl * self.real.sum(1).cpu()).sum()
        sums.ce[site] += ce

    def add_models(self, sums: RowSums, sparse_stream: Float[Tensor, "b s _"]) -> None:
        """Add the figures of both models by themselves."""
        tokens = self.real.sum(1).double().cpu()
        sums.rows += len(tokens)
        sums.tokens += tokens.sum()
        sums.tokens_squared += tokens.square().sum()
        sums.predictions += self.predicting.sum().cpu()
        sums.dense_ce += self._of(self.traces.dense.logits)[1].cpu()
        kl, ce = self.figures("sparse", sparse_stream)
        sums.sparse_ce += ce
        sums.kl_sparse_alone += kl.sum()
