import pytest
import torch
from pairs import (
    MASK,
    gpt2,
    gradients,
    join,
    naive_decode,
    naive_encode,
    naive_losses,
    neox,
    relative,
    sparse_model,
    tokens,
)

from bridges.objective.hybrid import (
    HybridLosses,
    hybrid_losses,
    kl_sum,
    run_path,
    single_switch_path,
    sparse_ce,
    squared_errors,
)
from bridges.objective.pair import Traces, trace_pair

PAIRS = {
    "equal depth": lambda: join(gpt2(), sparse_model()),
    "deeper dense": lambda: join(gpt2(layers=3), sparse_model(d_pos_emb=4, sink=False)),
    "deeper sparse": lambda: join(gpt2(layers=1), sparse_model(layers=2)),
    "block": lambda: join(neox(), sparse_model(rms_norm=False)),
}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    return PAIRS[request.param]()


@pytest.fixture
def ids():
    return tokens()


def test_the_four_losses_and_their_gradients_are_the_written_out_ones(pair, ids):
    sparse_parameters = [p for p in pair.sparse.model.parameters() if p.requires_grad]
    parameters = [*pair.bridge_set.parameters(), *sparse_parameters]
    mix = torch.rand(4, len(pair.bridge_set), generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    losses = hybrid_losses(*pair, ids, MASK)
    (torch.stack(list(losses)) * mix).sum().backward()
    found = gradients(parameters)
    columns, _ = naive_losses(pair, ids, MASK)
    naive = torch.stack([torch.stack(column) for column in columns])
    (naive * mix).sum().backward()
    expected = gradients(parameters)

    assert relative(torch.stack(list(losses)), naive) < 1e-10
    assert any(g.any() for g in expected[-len(sparse_parameters) :])
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < 1e-10 or (one - other).abs().max() < 1e-13


def test_the_encoders_target_passes_no_gradient_to_the_sparse_model(ids):
    pair = PAIRS["equal depth"]()
    hybrid_losses(*pair, ids, MASK).nmse_encode.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in pair.sparse.model.parameters())


@pytest.mark.parametrize("chosen", [["1.attn"], ["final", "0.attn"]])
def test_a_subset_of_sites_gives_those_rows_in_that_order(ids, chosen):
    pair = PAIRS["equal depth"]()
    whole = hybrid_losses(*pair, ids, MASK)
    some = hybrid_losses(*pair, ids, MASK, sites=chosen)
    rows = [pair.bridge_set.sites.index(site) for site in chosen]
    for name in HybridLosses._fields:
        assert torch.equal(getattr(some, name), getattr(whole, name)[rows])


def test_padding_may_hold_any_token_and_a_mask_of_ones_changes_nothing(ids):
    pair = PAIRS["block"]()
    other = torch.where(MASK.bool(), ids, (ids + 5) % 17)
    for one, two in zip(hybrid_losses(*pair, ids, MASK), hybrid_losses(*pair, other, MASK), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=0)
    ones = hybrid_losses(*pair, ids, torch.ones_like(ids))
    for one, two in zip(hybrid_losses(*pair, ids), ones, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=0)


def test_streams_of_padding_that_are_nan_change_neither_a_loss_nor_a_gradient(ids):
    """In the losses that no sublayer stands between: attention would carry a NaN on."""
    pair = PAIRS["equal depth"]()
    traces, padding = trace_pair(pair, ids, MASK), ~MASK.bool()[..., None]
    last, found = len(pair.bridge_set) - 1, []
    for spoiled in (0.0, float("nan")):
        leaves = [h.detach().masked_fill(padding, spoiled).requires_grad_() for h in traces.sparse.residuals]
        dense = [h.detach().masked_fill(padding, spoiled) for h in traces.dense.residuals]
        both = Traces(traces.dense._replace(residuals=dense), traces.sparse._replace(residuals=leaves))
        losses = torch.stack([*squared_errors(pair, both, 1), kl_sum(pair, both, last, "dense")])
        losses.sum().backward()
        ce = sparse_ce(pair, both, gradient_weight=1.0)  # adds its own gradient
        at_real = [leaf.grad[MASK.bool()] for leaf in (leaves[1], leaves[-1])]
        found.append([losses.detach(), ce, *at_real, *gradients(pair.bridge_set[1].parameters())])
        assert not leaves[1].grad[~MASK.bool()].any()
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-13, atol=0)
        assert one.isfinite().all() and one.any()


def test_models_are_given_as_objects_residual_models_or_folders(ids, tmp_path):
    pair = join(gpt2(dtype=torch.float32), sparse_model(dtype=torch.float32))
    expected = hybrid_losses(pair.dense, pair.sparse, pair.bridge_set, ids)
    pair.dense.model.save_pretrained(tmp_path / "dense")
    pair.sparse.model.save_pretrained(tmp_path / "sparse")
    for dense, sparse in (
        (pair.dense.model, pair.sparse.model),
        (tmp_path / "dense", str(tmp_path / "sparse")),
    ):
        found = hybrid_losses(dense, sparse, pair.bridge_set, ids)
        assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_where_the_target_does_not_vary_the_nmse_is_nan_and_the_gradients_are_finite():
    """One counted token, so both targets are their own means."""
    pair, ids = PAIRS["equal depth"](), tokens(1, 2)
    losses = hybrid_losses(*pair, ids)
    assert losses.nmse_encode.isnan().all() and losses.nmse_decode.isnan().all()
    sum(loss.sum() for loss in losses).backward()
    found = gradients([*pair.bridge_set.parameters(), *pair.sparse.model.parameters()])
    assert all(g.isfinite().all() for g in found) and any(g.any() for g in found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": torch.full((2, 4), 99)}, "input_ids holds token 99; valid ids are 0 to 16"),
        ({"input_ids": torch.zeros(2, 40).long()}, "input_ids has rows of 40 tokens, over the models' context of 12"),
        ({"input_ids": torch.zeros(4).long()}, r"input_ids=\(4,\) must be a tensor of token ids"),
        ({"input_ids": torch.zeros(2, 1).long()}, r"input_ids has rows of 1 real token\(s\)"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask \(1, 3\) must have the shape \(2, 4\)"),
        ({"sites": []}, r"sites=\[\] names no site"),
    ],
)
def test_tokens_and_sites_that_do_not_fit_are_refused(given, message, unchecked):
    pair = join(gpt2(), sparse_model())
    with pytest.raises(ValueError, match=message):
        hybrid_losses(*pair, **({"input_ids": torch.zeros(2, 4).long()} | given))


def test_other_models_are_refused_unless_the_caller_insists(ids):
    pair = PAIRS["equal depth"]()
    pair.bridge_set.record_models(pair.dense.model, pair.sparse.model)
    other = sparse_model(seed=99)
    with pytest.raises(ValueError, match="sparse=SparseTransformer is not the model"):
        hybrid_losses(pair.dense, other, pair.bridge_set, ids)
    with pytest.raises(ValueError, match="dense=GPT2LMHeadModel is not the model"):
        hybrid_losses(gpt2(seed=99), pair.sparse, pair.bridge_set, ids)
    hybrid_losses(pair.dense, other, pair.bridge_set, ids, check_models=False)


def naive_path(pair, ids, path):
    """Sublayer by sublayer, each with a context of its own, crossing by the written-out bridge."""
    models = {"dense": pair.dense, "sparse": pair.sparse}
    sites = {
        name: [model.sites.index(p[name == "sparse"]) for p in pair.bridge_set.site_pairs]
        for name, model in models.items()
    }
    side = path[0]
    stream, index = models[side].context(ids, MASK).embedding, 0
    for j, bridge in enumerate(pair.bridge_set):
        while index < sites[side][j]:
            stream = models[side].sublayer(index, stream, models[side].context(ids, MASK))
            index += 1
        if path[j + 1] != side:
            stream = naive_encode(bridge, stream) if side == "dense" else naive_decode(bridge, stream)
            side = path[j + 1]
            index = sites[side][j]
    return models[side].run_from(index, stream, ids, MASK)


@pytest.mark.parametrize("changes", ["dsdsdd", "sdssds", "ddddds", "sddddd", "dssssd"])
def test_a_path_is_the_composition_of_its_sublayers(ids, changes):
    pair = join(gpt2(layers=3), sparse_model())
    path = ["dense" if side == "d" else "sparse" for side in changes]
    with torch.no_grad():
        found = run_path(pair, trace_pair(pair, ids, MASK), path)
        expected = naive_path(pair, ids, path)
    assert relative(found[MASK.bool()], expected[MASK.bool()]) < 1e-10


def test_a_path_without_a_change_is_the_models_own_logits(ids):
    pair = PAIRS["block"]()
    n = len(pair.bridge_set)
    with torch.no_grad():
        traces = trace_pair(pair, ids)
        assert torch.equal(run_path(pair, traces, ["dense"] * (n + 1)), pair.dense.model(ids).logits)
        assert torch.equal(run_path(pair, traces, ["sparse"] * (n + 1)), pair.sparse.model(ids).logits)


def test_a_single_switch_path_changes_sides_at_its_bridge():
    assert single_switch_path(3, 1, "dense") == ("dense", "dense", "sparse", "sparse")
    assert single_switch_path(2, 0, "sparse") == ("sparse", "dense", "dense")


def test_half_precision_models_get_losses_in_float32(ids):
    """KL of bfloat16 logits is computed in float32, so it is that of the rounded logits, not rounded again."""
    pair = join(gpt2(dtype=torch.bfloat16), sparse_model(dtype=torch.bfloat16))
    losses = hybrid_losses(*pair, ids, MASK)
    assert all(loss.dtype == torch.float32 for loss in losses)
    traces = trace_pair(pair, ids, MASK)
    logits = run_path(pair, traces, single_switch_path(len(pair.bridge_set), 0, "dense"))[MASK.bool()].double()
    target = traces.dense.logits[MASK.bool()].double()
    by_hand = (target.softmax(-1) * (target.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(losses.kl_dense_to_sparse[0].double(), by_hand, rtol=1e-5, atol=0)
