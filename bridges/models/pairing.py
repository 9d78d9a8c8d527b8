"""Which site of the dense model is bridged with which site of the sparse model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bridges.models.residual import ResidualModel, Site


class SitePair(NamedTuple):
    """The two sites of one bridge."""

    dense: Site
    sparse: Site


def pair_sites(
    dense: ResidualModel,
    sparse: ResidualModel,
    site_map: Sequence[tuple[str, str]] | None = None,
    sites: Sequence[str] | None = None,
) -> list[SitePair]:
    """Pair the sites of two models, one-to-one and in increasing order on both sides.

    Without `site_map`, a list of (dense site, sparse site), layers pair by depth and sites by kind, and a `block` pairs
    with an `attn`. `sites` keeps the pairs of the sparse sites that it names. Raises ValueError for a site that a model
    does not have, and for an order that does not increase.
    """
    pairs = _mapped(dense, sparse, site_map) if site_map is not None else _by_depth(dense.sites, sparse.sites)
    if sites is not None:
        known = [pair.sparse for pair in pairs]
        if unknown := [site for site in sites if site not in known]:
            raise ValueError(f"sites={unknown[0]!r} is not a bridged site of the sparse model; those are {known}")
        pairs = [pair for pair in pairs if pair.sparse in sites]
    if not pairs:
        raise ValueError(f"sites={sites!r}, site_map={site_map!r} leave no pair of sites to bridge; name at least one")
    for side, model in (("dense", dense), ("sparse", sparse)):
        order = [model.index(getattr(pair, side)) for pair in pairs]
        if order != sorted(set(order)):
            raise ValueError(f"site_map={site_map!r}: its {side} sites must increase, each used once")
    return pairs


def _mapped(dense: ResidualModel, sparse: ResidualModel, site_map: Sequence[tuple[str, str]]) -> list[SitePair]:
    return [SitePair(dense.sites[dense.index(d)], sparse.sites[sparse.index(s)]) for d, s in site_map]


def _by_depth(dense: list[Site], sparse: list[Site]) -> list[SitePair]:
    n_dense, n_sparse = _n_layers(dense), _n_layers(sparse)
    few, many = sorted((n_dense, n_sparse))
    pairs = []
    for j in range(few):
        deeper = round(j * (many - 1) / (few - 1)) if few > 1 else 0
        layer_dense, layer_sparse = (j, deeper) if n_dense == few else (deeper, j)
        kinds_dense, kinds_sparse = _kinds(dense, layer_dense), _kinds(sparse, layer_sparse)
        for kind, site in kinds_sparse.items():
            other = kinds_dense.get(kind)
            if other is None and kind in ("attn", "block"):
                other = kinds_dense.get("block" if kind == "attn" else "attn")
            if other is not None:
                pairs.append(SitePair(other, site))
    return [*pairs, SitePair(dense[-1], sparse[-1])]


def _n_layers(sites: list[Site]) -> int:
    return 1 + max(site.layer for site in sites if site.layer is not None)


def _kinds(sites: list[Site], layer: int) -> dict[str, Site]:
    return {site.kind: site for site in sites if site.layer == layer}
