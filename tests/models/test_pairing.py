import pytest
import torch

from bridges.models.loading import as_residual
from bridges.models.pairing import pair_sites
from bridges.models.residual import ResidualModel, Site
from bridges.models.sparse.model import SparseConfig, SparseTransformer


class Sites(ResidualModel):
    """A model with sites and nothing else."""

    def __init__(self, *names):
        self.sites = [Site(name) for name in names] + [Site("final")]

    def context(self, input_ids, attention_mask=None):
        raise NotImplementedError

    sublayer = head = read_modules = norm = hook_residuals = context


def split(*layers):
    return Sites(*[f"{layer}.{kind}" for layer in layers for kind in ("attn", "mlp")])


def blocks(n):
    return Sites(*[f"{layer}.block" for layer in range(n)])


def names(pairs):
    return [(str(pair.dense), str(pair.sparse)) for pair in pairs]


def both(*layers):
    return [(f"{d}.{kind}", f"{s}.{kind}") for d, s in layers for kind in ("attn", "mlp")] + [("final", "final")]


def test_equal_depth_pairs_equal_names():
    assert names(pair_sites(split(0, 1, 2), split(0, 1, 2))) == both((0, 0), (1, 1), (2, 2))


@pytest.mark.parametrize(
    ("few", "many", "deeper"),
    [(2, 5, [0, 4]), (3, 5, [0, 2, 4]), (3, 4, [0, 2, 3]), (4, 6, [0, 2, 3, 5]), (1, 4, [0]), (2, 3, [0, 2])],
)
def test_layers_of_unequal_depth_pair_by_relative_depth(few, many, deeper):
    shallow, deep = split(*range(few)), split(*range(many))
    assert names(pair_sites(shallow, deep)) == both(*enumerate(deeper))
    assert names(pair_sites(deep, shallow)) == both(*[(there, here) for here, there in enumerate(deeper)])


def test_a_block_pairs_with_attention_whichever_side_it_is_on():
    last = [("final", "final")]
    assert names(pair_sites(blocks(2), split(0, 1))) == [("0.block", "0.attn"), ("1.block", "1.attn"), *last]
    assert names(pair_sites(split(0, 1), blocks(2))) == [("0.attn", "0.block"), ("1.attn", "1.block"), *last]
    assert names(pair_sites(blocks(2), blocks(2))) == [("0.block", "0.block"), ("1.block", "1.block"), *last]
    mixed = Sites("0.block", "1.attn", "1.mlp")
    expected = [("0.block", "0.attn"), ("1.attn", "1.attn"), ("1.mlp", "1.mlp"), *last]
    assert names(pair_sites(mixed, split(0, 1))) == expected


def test_site_map_replaces_the_default():
    given = [("1.attn", "0.mlp"), ("final", "1.attn")]
    assert names(pair_sites(split(0, 1), split(0, 1), site_map=given)) == given
    pair = pair_sites(split(0, 1), split(0, 1), site_map=given)[0]
    assert isinstance(pair.dense, Site) and (pair.dense.layer, pair.sparse.kind) == (1, "mlp")


def test_sites_restrict_by_the_sparse_name_and_keep_the_order():
    pairs = pair_sites(split(0, 1, 2), split(0, 1), sites=["final", "1.attn"])
    assert names(pairs) == [("2.attn", "1.attn"), ("final", "final")]
    mapped = pair_sites(split(0, 1), split(0, 1), [("0.mlp", "1.attn"), ("1.mlp", "1.mlp")], ["1.mlp"])
    assert names(mapped) == [("1.mlp", "1.mlp")]


@pytest.mark.parametrize(
    ("site_map", "sites", "message"),
    [
        ([("7.attn", "0.attn")], None, "site_map has '7.attn', which is not a site of the dense model; it has 0.attn"),
        ([("0.attn", "0.block")], None, "site_map has '0.block', which is not a site of the sparse model; it has"),
        ([("0.attn", "0.attn"), ("0.attn", "0.mlp")], None, "its dense sites must increase"),
        ([("0.attn", "0.attn"), ("0.mlp", "0.attn")], None, "its sparse sites must increase"),
        ([("1.attn", "0.attn"), ("0.attn", "1.attn")], None, "its dense sites must increase"),
        ([], None, r"site_map=\[\] leave no pair"),
        (None, [], r"sites=\[\].* leave no pair"),
        (None, ["0.attn", "9.mlp"], r"sites='9.mlp' is not a bridged site.*\['0.attn', '0.mlp', '1.attn', "),
        ([("0.attn", "0.attn")], ["0.mlp"], "sites='0.mlp' is not a bridged site"),
    ],
)
def test_a_map_or_sites_that_fit_no_model_are_refused(site_map, sites, message):
    with pytest.raises(ValueError, match=message):
        pair_sites(split(0, 1), split(0, 1), site_map, sites)


def test_models_of_unequal_depth_pair_by_their_own_sites(tiny):
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "block_size": 9, "n_layer": 3, "d_model": 16, "n_head": 2, "d_head": 4, "d_mlp": 24}
    sparse = as_residual(SparseTransformer(SparseConfig(**shape)))
    assert names(pair_sites(as_residual(tiny("gpt2")), sparse)) == both((0, 0), (1, 2))
    expected = [("0.block", "0.attn"), ("1.block", "2.attn"), ("final", "final")]
    assert names(pair_sites(as_residual(tiny("gpt_neox")), sparse)) == expected
