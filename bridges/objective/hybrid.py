"""Hybrid passes through two bridged models, and the paper's losses on them (paper A.3; method, section 2).

At every bridged site i, where h_i^d and h_i^s are the residual streams of the dense and the sparse model, f_i is the
encoder, g_i the decoder, y^d the dense model's logits, and a tail the rest of a model, from site i to the logits:

    nmse_encode[i]        = NMSE(f_i(h_i^d), stopgrad h_i^s)
    nmse_decode[i]        = NMSE(g_i(h_i^s), h_i^d)
    kl_dense_to_sparse[i] = KL(y^d || sparse tail from f_i(h_i^d))
    kl_sparse_to_dense[i] = KL(y^d || dense  tail from g_i(h_i^s))

    NMSE(p, t) = sum |p - t|^2 / sum |t - mean(t)|^2       sums over the tokens of `counted_at`
    KL         = mean over real tokens, in nats, exact over the vocabulary

`bridges.fitting.gradients` minimises their weighted mean over sites. The hybrid passes of both KLs are paths that
change models once; `run_path` runs any path.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bridges.bridge import BridgeSet
from bridges.models.loading import as_residual
from bridges.models.modes import frozen
from bridges.models.residual import ResidualModel
from bridges.models.tokens import check_tokens
from bridges.objective.head import TokenLoss, backward_from_head
from bridges.objective.normalizers import combine_moments, nmse, predicting_tokens
from bridges.objective.pair import SIDES, ModelPair, Side, Traces, batch_moments, counted_at, residuals_at, trace_pair
from bridges.ops.kl import kl_divergence

ALL_POSITIONS = slice(None)
NO_LABEL = -100
"""What torch's cross-entropy ignores."""


class HybridLosses(NamedTuple):
    """The four losses of `hybrid_losses`, one entry per site; NMSE as a fraction of variance, KL in nats.

    >>> losses = HybridLosses(*torch.tensor([[0.5], [0.25], [1.5], [2.0]]))
    >>> losses.kl_dense_to_sparse
    tensor([1.5000])
    """

    nmse_encode: Float[Tensor, " n_sites"]
    nmse_decode: Float[Tensor, " n_sites"]
    kl_dense_to_sparse: Float[Tensor, " n_sites"]
    kl_sparse_to_dense: Float[Tensor, " n_sites"]


def run_path(pair: ModelPair, traces: Traces, path: Sequence[Side]) -> Float[Tensor, "b s vocab"]:
    """Logits of a hybrid pass: `path[j]` names the model that runs the sublayers before bridged site j.

    The path's last entry names the model that runs from the last bridged site to the logits. Where the side changes,
    the stream crosses the bridge of that site, by f from dense to sparse and by g from sparse to dense. The sublayers
    before the first change are not run again: `traces` holds their result.
    """
    side = path[-1]
    return pair.model(side).head(run_path_to_final(pair, traces, path), traces.side(side).context)


def run_path_to_final(pair: ModelPair, traces: Traces, path: Sequence[Side]) -> Float[Tensor, "b s _"]:
    """The stream at `final`, of the model that the path ends in, after a hybrid pass (see `run_path`)."""
    n = len(pair.bridge_set)
    first = next((j for j in range(n) if path[j] != path[j + 1]), n - 1)
    stream = traces.side(path[first]).residuals[pair.site(path[first], first)]
    for j in range(first, n):
        side = path[j + 1]
        stream = pair.cross(j, stream, path[j], side)
        model = pair.model(side)
        end = len(model.sites) - 1 if j == n - 1 else pair.site(side, j + 1)
        stream = model.run(pair.site(side, j), end, stream, traces.side(side).context)
    return stream


def path_kl(
    pair: ModelPair, traces: Traces, path: Sequence[Side], gradient_weight: float = 0.0, divisor: Tensor | None = None
) -> Float[Tensor, ""]:
    """The sum over real tokens of KL(y || hybrid pass), nats, whose logits never exist all at once.

    The gradient of `gradient_weight` times the sum, over `divisor` if there is one, is added to every leaf; the sum
    itself has no graph.
    """
    return _from_logits(pair, traces, path, partial(kl_from_dense, traces), gradient_weight, divisor)


def sparse_ce(
    pair: ModelPair, traces: Traces, gradient_weight: float = 0.0, divisor: Tensor | None = None
) -> Float[Tensor, ""]:
    """The sum of the sparse model's own next-token cross-entropy over the tokens of `predicting_tokens`, nats.

    In at least float32, over the vocabulary that both models have; logits and gradient as in `path_kl`.
    """
    next_of_rows = next_tokens(traces)

    def ce_sum(logits: Float[Tensor, "b kept vocab"], positions: slice) -> Float[Tensor, ""]:
        logits = common_logits(traces, logits)
        predicting, labels = (whole[:, positions].to(logits.device) for whole in next_of_rows)
        wide = torch.promote_types(logits.dtype, torch.float32)
        # Zeros at the others, since logits of padding that are NaN would give a gradient of NaN.
        kept = torch.where(predicting[..., None], logits, 0).flatten(0, 1).to(wide)
        return F.cross_entropy(kept, labels.masked_fill(~predicting, NO_LABEL).flatten(), reduction="sum")

    path = single_side_path(len(pair.bridge_set), "sparse")
    return _from_logits(pair, traces, path, ce_sum, gradient_weight, divisor)


def _from_logits(
    pair: ModelPair,
    traces: Traces,
    path: Sequence[Side],
    loss: TokenLoss,
    gradient_weight: float,
    divisor: Tensor | None,
) -> Float[Tensor, ""]:
    """A loss summed over the tokens of a hybrid pass, and its gradient."""
    side = path[-1]
    with torch.set_grad_enabled(torch.is_grad_enabled() and gradient_weight != 0):
        stream = run_path_to_final(pair, traces, path)
        return backward_from_head(
            pair.model(side),
            stream,
            traces.side(side).context,
            loss,
            gradient_weight if divisor is None else gradient_weight / divisor,
        )


def single_side_path(n_sites: int, side: Side) -> tuple[Side, ...]:
    """The path of one model alone."""
    return (side,) * (n_sites + 1)


def single_switch_path(n_sites: int, bridge: int, start: Side) -> tuple[Side, ...]:
    """The path that begins on side `start` and changes once, at `bridge`."""
    end: Side = "sparse" if start == "dense" else "dense"
    return (start,) * (bridge + 1) + (end,) * (n_sites - bridge)


def random_path(n_sites: int, changes: int, generator: torch.Generator) -> tuple[Side, ...]:
    """A path that changes sides `changes` times, at bridges and from a side that are drawn evenly.

    >>> random_path(3, 2, torch.Generator().manual_seed(0))
    ('sparse', 'dense', 'dense', 'sparse')
    """
    at = set(torch.randperm(n_sites, generator=generator)[:changes].tolist())
    side = int(torch.randint(2, (), generator=generator))
    path: list[Side] = [SIDES[side]]
    for bridge in range(n_sites):
        side = 1 - side if bridge in at else side
        path.append(SIDES[side])
    return tuple(path)


def squared_errors(pair: ModelPair, traces: Traces, bridge: int) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The numerators of nmse_encode and nmse_decode at one site: sum |p - t|^2 over counted tokens and channels."""
    counted = counted_at(pair, traces, bridge)[..., None]
    # Padding may hold anything, NaN included, so it is set to zero: the gradient of a weight is a sum of products with
    # the streams, where zero times NaN is NaN. To take padding out would make the host wait for a GPU.
    h_dense, h_sparse = (torch.where(counted, h, 0) for h in residuals_at(pair, traces, bridge))
    maps = pair.bridge_set[bridge]
    # The encoder's target gets no gradient: the sparse model would learn to be easy to predict.
    return (
        _squared_error(maps.encode(h_dense), h_sparse.detach(), counted),
        _squared_error(maps.decode(h_sparse), h_dense.detach(), counted),
    )


def kl_sum(pair: ModelPair, traces: Traces, bridge: int, start: Side) -> Float[Tensor, ""]:
    """The numerator of a KL: the sum over real tokens of KL(y || hybrid pass that changes models at `bridge`), nats."""
    return kl_from_dense(traces, run_path(pair, traces, single_switch_path(len(pair.bridge_set), bridge, start)))


def common_logits(traces: Traces, logits: Float[Tensor, "*b vocab"]) -> Float[Tensor, "*b common"]:
    """One model's logits of the tokens that both models have; those of `traces` are of no others."""
    return logits[..., : traces.dense.logits.shape[-1]]


def kl_from_dense(
    traces: Traces, logits: Float[Tensor, "b kept vocab"], positions: slice = ALL_POSITIONS
) -> Float[Tensor, ""]:
    """The sum over real tokens of KL(y || softmax(logits)), nats, y the dense model's own prediction.

    `logits` are those of the rows' `positions`. Over the vocabulary that both models have: logits beyond it are of
    padding, or of tokens that one side alone knows.
    """
    target = traces.dense.logits.detach()[:, positions].to(logits.device)
    logits = common_logits(traces, logits)
    mask = traces.dense.context.attention_mask
    real = None if mask is None else mask[:, positions].bool().to(logits.device).flatten()
    return kl_divergence(target.flatten(0, 1), logits.flatten(0, 1), real)


def next_tokens(traces: Traces) -> tuple[Bool[Tensor, "b s"], Int[Tensor, "b s"]]:
    """Where a real token follows a real one, and the token that follows each; the last position's means nothing."""
    ids, mask = traces.dense.context.input_ids, traces.dense.context.attention_mask
    return F.pad(predicting_tokens(ids, mask), (0, 1)), ids.roll(-1, 1)


def hybrid_losses(
    dense: nn.Module | ResidualModel | str | Path,
    sparse: nn.Module | ResidualModel | str | Path,
    bridge_set: BridgeSet,
    input_ids: Int[Tensor, "b s"],
    attention_mask: Int[Tensor, "b s"] | Bool[Tensor, "b s"] | None = None,
    sites: Sequence[str] | None = None,
    *,
    check_models: bool = True,
) -> HybridLosses:
    """The reconstruction and hybrid losses of a bridge set on a batch (paper A.3; method, section 2).

    Args:
        dense: the dense model: a model object, a `ResidualModel`, a folder or a hub id. It runs in evaluation mode.
        sparse: the sparse model, given in the same ways. It runs in the mode it is in.
        bridge_set: the bridges between them.
        input_ids: tokens [batch, seq].
        attention_mask: 1 at real tokens, 0 at padding, [batch, seq]; None where no token is padding.
        sites: sparse sites to compute the losses at, in this order; by default all that have a bridge.
        check_models: whether to refuse models that the bridges were not fitted to.

    Returns:
        Four tensors [n_sites], differentiable with respect to the bridges, and to the sparse model where its parameters
        require gradients. An NMSE is a fraction of the target's variance, and NaN where the target does not vary; a KL
        is a mean over real tokens, in nats.

    Raises:
        ValueError: the bridges were fitted to other models, or tokens, mask or sites do not fit.
        OSError: no model is found at a path or hub id.

    >>> import bridges
    >>> pair = bridges.load_pair()
    >>> ids = torch.randint(1024, (64, 32), generator=torch.Generator().manual_seed(0))
    >>> bridge_set = bridges.fit(pair.dense, pair.sparse, ids, steps=0, ridge=0.1, sites=("0.mlp",), progress=False)
    >>> losses = bridges.hybrid_losses(pair.dense, pair.sparse, bridge_set, ids[:2])
    >>> losses.nmse_decode.shape
    torch.Size([1])
    >>> sum(loss.sum() for loss in losses).backward()
    """
    pair = ModelPair(as_residual(dense), as_residual(sparse), bridge_set)
    if check_models:
        bridge_set.check_models(pair.dense.model, pair.sparse.model)
    input_ids, attention_mask = check_tokens("input_ids", input_ids, attention_mask, pair.dense, pair.sparse)
    if sites is not None and not len(sites):
        raise ValueError(f"sites={sites!r} names no site; name one or more, or leave it out for all")
    bridges = range(len(bridge_set)) if sites is None else [bridge_set.index(site) for site in sites]
    for model in (pair.dense, pair.sparse) if torch.is_grad_enabled() else ():
        model.check_differentiable()
    with frozen(pair.dense.model):  # the dense model is a fixed target: no dropout, no gradient
        return _losses(pair, trace_pair(pair, input_ids, attention_mask), bridges)


def _losses(pair: ModelPair, traces: Traces, bridges: Sequence[int]) -> HybridLosses:
    normalizers = combine_moments([batch_moments(pair, traces)])
    rows = []
    for i in bridges:
        error_encode, error_decode = squared_errors(pair, traces, i)
        kls = [kl_sum(pair, traces, i, start) for start in SIDES]
        rows.append(
            (
                nmse(error_encode, normalizers.variance_sparse[i]),
                nmse(error_decode, normalizers.variance_dense[i]),
                *(kl / normalizers.tokens.to(kl) for kl in kls),
            )
        )
    device = rows[0][0].device
    return HybridLosses(*(torch.stack([loss.to(device) for loss in column]) for column in zip(*rows, strict=True)))


def _squared_error(prediction: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    # Under autocast the prediction may be float16, in which squares over 65504 overflow.
    wide = torch.promote_types(prediction.dtype, torch.float32)
    return torch.where(counted, prediction.to(wide) - target.to(wide), 0).square().sum()
