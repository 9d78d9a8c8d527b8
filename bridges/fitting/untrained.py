"""The bridges of a fit before it starts: which sites they join, in which dtype, of which k."""

from __future__ import annotations

import warnings

import torch

from bridges.bridge import Bridge, BridgeSet
from bridges.config import FitConfig
from bridges.models.pairing import SitePair, pair_sites
from bridges.models.residual import ResidualModel
from bridges.models.sparse.model import SparseTransformer
from bridges.objective.pair import ModelPair


def untrained_pair(dense: ResidualModel, sparse: ResidualModel, config: FitConfig) -> ModelPair:
    """Bridges of zeros between the paired sites, in the promoted dtype of both models, at least float32."""
    pairs = _bridgeable(dense, sparse, pair_sites(dense, sparse, config.site_map, config.sites), config)
    dtype = torch.promote_types(torch.promote_types(dense.dtype, sparse.dtype), torch.float32)
    k = config.k or _default_k(sparse)
    if k > sparse.d_model:
        raise ValueError(f"k={k} is over the sparse model's width {sparse.d_model}; pass {sparse.d_model} or less")
    bridges = [Bridge(dense.d_model, sparse.d_model, k, dtype) for _ in pairs]
    return ModelPair(dense, sparse, BridgeSet([(p.dense, p.sparse) for p in pairs], bridges).to(dense.device))


def _bridgeable(
    dense: ResidualModel, sparse: ResidualModel, pairs: list[SitePair], config: FitConfig
) -> list[SitePair]:
    """The pairs whose sites both have a read with a norm that R can be measured for.

    Warns of those that a default pairing leaves out. Raises ValueError for one that the settings name, and where none
    is left.
    """
    reasons: dict[SitePair, str] = {}
    for pair in pairs:
        for model, site in ((dense, pair.dense), (sparse, pair.sparse)):
            try:
                model.norm(model.index(site))
            except ValueError as error:  # `norm` measures, so only trying tells
                reasons.setdefault(pair, str(error))
    kept = [pair for pair in pairs if pair not in reasons]
    if reasons:
        possible = ", ".join(pair.sparse for pair in kept) or "none"
        named = config.sites is not None or config.site_map is not None
        first = next(iter(reasons.values()))
        if named or not kept:
            raise ValueError(f"{first}; sites of this pair that can be bridged: {possible}")
        left_out = ", ".join(pair.sparse for pair in reasons)
        warnings.warn(f"the fit leaves out the sites {left_out}: {first}; it bridges {possible}", stacklevel=2)
    return kept


def _default_k(sparse: ResidualModel) -> int:
    kept = sparse.model.config.kept("attn_in") if isinstance(sparse.model, SparseTransformer) else None
    return min(kept or max(1, sparse.d_model // 4), sparse.d_model)
