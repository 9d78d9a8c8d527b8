"""What two models must share, and which sites of theirs are bridged: one vocabulary, and sites in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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


def common_vocabulary(dense: ResidualModel, sparse: ResidualModel, tokenizers: tuple[Any, Any] = (None, None)) -> int:
    """How many tokens, counted from token 0, both models have logits for.

    The wider model's other logits are padding, or tokens that were added on its side alone. `tokenizers` are the dense
    and the sparse model's, None where unknown; `one_sided_tokens` has those that only one of them knows.

    Raises ValueError, naming what differs, where the tokenizers disagree, where a model lacks ordinary tokens, or where
    the models differ in width and no tokenizer says what the surplus is.
    """
    sizes = dense.vocab_size, sparse.vocab_size
    known = [tokenizer for tokenizer in tokenizers if tokenizer is not None]
    if not known and sizes[0] != sizes[1]:
        raise ValueError(
            f"dense and sparse have different vocabularies, {sizes[0]} and {sizes[1]} tokens, and no tokenizer is "
            "saved with them that says whether the surplus is padding; pass tokenizer="
        )
    one_sided_tokens(tokenizers)
    for tokenizer in known:
        if lacking := {index: token for token, index in _ordinary(tokenizer).items() if index >= min(sizes)}:
            raise ValueError(
                f"dense and sparse have {sizes[0]} and {sizes[1]} tokens, but the tokenizer has {len(lacking)} "
                f"ordinary ones from {min(sizes)} on, such as {lacking[min(lacking)]!r}; "
                "bridges need two models of one tokenizer"
            )
    return min(sizes)


def one_sided_tokens(tokenizers: tuple[Any, Any]) -> dict[int, str]:
    """The added tokens, by id, that only one of two tokenizers has: a padding token, the marks of a chat template.

    None where one of the tokenizers is unknown (None). Raises ValueError where they disagree on anything else.
    """
    one, other = tokenizers
    if one is None or other is None or one is other:
        return {}
    vocabularies = one.get_vocab(), other.get_vocab()
    by_id = [{index: token for token, index in vocabulary.items()} for vocabulary in vocabularies]
    ordinary, found = _ordinary(one) | _ordinary(other), {}
    for index in sorted(by_id[0].keys() | by_id[1].keys()):
        here, there = (tokens.get(index) for tokens in by_id)
        if here == there:
            continue
        token = here or there
        if (here is not None and there is not None) or token in ordinary:
            common = len(vocabularies[0].items() & vocabularies[1].items())
            raise ValueError(
                f"dense and sparse have different tokenizers, {len(vocabularies[0])} and {len(vocabularies[1])} tokens "
                f"that do not agree ({common} do): token {index} is {here!r} of dense and {there!r} of sparse; "
                "bridges need one tokenizer for both, saved with both models"
            )
        found[index] = token
    return found


def _ordinary(tokenizer: Any) -> dict[str, int]:
    """The tokens that text is made of: all but the special ones and others that were added to the vocabulary."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {token: index for token, index in tokenizer.get_vocab().items() if index not in added}


def _mapped(dense: ResidualModel, sparse: ResidualModel, site_map: Sequence[tuple[str, str]]) -> list[SitePair]:
    def site(side: str, model: ResidualModel, name: str) -> Site:
        if isinstance(name, str) and name not in model.sites:
            known = ", ".join(model.sites)
            raise ValueError(f"site_map has {name!r}, which is not a site of the {side} model; it has {known}")
        return model.sites[model.index(name)]

    return [SitePair(site("dense", dense, d), site("sparse", sparse, s)) for d, s in site_map]


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
