import json
import math
import sys

import pytest
import torch
from pairs import (
    MASK,
    at,
    counted_places,
    gpt2,
    join,
    naive_abs_topk,
    naive_ce,
    naive_kl,
    naive_losses,
    naive_nmse,
    naive_path_kl,
    neox,
    real_places,
    sparse_model,
    tokens,
)

import bridges
from bridges.bridge_report import FIGURES
from bridges.evaluate import affordable_kl_rows, evaluate, measure
from bridges.models import loading
from bridges.objective import head

evaluate_module = sys.modules["bridges.evaluate"]  # `bridges.evaluate` is the function
PAIRS = {
    "equal depth": lambda: join(gpt2(), sparse_model()),
    "block": lambda: join(neox(), sparse_model(layers=3)),
}
DATA = {"input_ids": tokens(), "attention_mask": MASK}


def naive_shuffled(predictions, targets):
    """Every prediction held against every target."""
    errors = sum((p - t).square().sum() for p in predictions for t in targets) / len(predictions)
    return errors / (targets - targets.mean(0)).square().sum()


def naive_report(pair):
    """Every figure of every site, written out."""
    ids, mask = tokens(), MASK
    real, counted = real_places(ids, mask), counted_places(ids, mask)
    h_dense, y_dense = pair.dense.residuals(ids, mask)
    h_sparse, y_sparse = pair.sparse.residuals(ids, mask)
    (encode, decode, to_sparse, to_dense), sparse_ce = naive_losses(pair, ids, mask)
    dense_ce = naive_ce(y_dense, ids, mask)
    sites = []
    for i, ((dense_site, sparse_site), bridge) in enumerate(
        zip(pair.bridge_set.site_pairs, pair.bridge_set, strict=True)
    ):
        h, z = h_dense[pair.dense.sites.index(dense_site)], h_sparse[pair.sparse.sites.index(sparse_site)]
        encoded = naive_abs_topk(h @ bridge.encoder_weight.T + bridge.encoder_bias, bridge.k)
        decoded = z @ bridge.decoder_weight.T + bridge.decoder_bias
        mean_h, mean_z = (at(x, counted).mean(0).expand_as(x).contiguous() for x in (h, z))
        ablated_sparse = pair.sparse.run_from(sparse_site, mean_z, ids, mask)
        ablated_dense = pair.dense.run_from(dense_site, mean_h, ids, mask)
        bridged_sparse = pair.sparse.run_from(sparse_site, encoded, ids, mask)
        bridged_dense = pair.dense.run_from(dense_site, decoded, ids, mask)

        def recovered(bridged, ablated):
            worst = naive_ce(ablated, ids, mask)
            return (worst - naive_ce(bridged, ids, mask)) / (worst - dense_ce)

        def standard_error(logits):
            """Of the ratio of the sums over rows of KL and of tokens."""
            per_row = [[place for place in real if place[0] == row] for row in range(len(ids))]
            n = torch.tensor([len(places) for places in per_row]).double()
            kl = torch.stack([naive_kl(y_dense, logits, places) * len(places) for places in per_row])
            squares = (kl - kl.sum() / n.sum() * n).square().sum()
            return (len(ids) / (len(ids) - 1) * squares).sqrt() / n.sum()

        sites.append(
            {
                "nmse_encode": encode[i],
                "nmse_encode_floor": naive_nmse(naive_abs_topk(at(z, counted), bridge.k), at(z, counted)),
                "nmse_decode": decode[i],
                "nmse_decode_shuffled": naive_shuffled(at(decoded, counted), at(h, counted)),
                "kl_dense_to_sparse": to_sparse[i],
                "kl_sparse_to_dense": to_dense[i],
                "kl_dense_to_sparse_mean_ablation": naive_kl(y_dense, ablated_sparse, real),
                "kl_sparse_to_dense_mean_ablation": naive_kl(y_dense, ablated_dense, real),
                "ce_recovered_dense_to_sparse": recovered(bridged_sparse, ablated_sparse),
                "ce_recovered_sparse_to_dense": recovered(bridged_dense, ablated_dense),
                "massive_share": torch.tensor(0.0),
                "nmse_encode_all_tokens": encode[i],
                "nmse_decode_all_tokens": decode[i],
                "kl_dense_to_sparse_se": standard_error(bridged_sparse),
                "kl_sparse_to_dense_se": standard_error(bridged_dense),
            }
        )
    return sites, dense_ce, sparse_ce, naive_kl(y_dense, y_sparse, real)


@pytest.mark.parametrize("n_tokens", [None, 1, 5], ids=["all logits at once", "one position", "two positions"])
@pytest.mark.parametrize("build", PAIRS.values(), ids=PAIRS)
def test_every_figure_is_the_written_out_one(build, n_tokens, monkeypatch):
    if n_tokens is not None:
        monkeypatch.setattr(head, "CHUNK_LOGITS", 1)
        monkeypatch.setattr(head, "MIN_TOKENS", n_tokens)
    pair = build()
    report = evaluate(*pair, DATA)
    with torch.no_grad():
        sites, dense_ce, sparse_ce, alone = naive_report(pair)
    assert set(sites[0]) == set(FIGURES)
    for site, expected in zip(report.sites, sites, strict=True):
        for name, value in expected.items():
            assert math.isclose(getattr(site, name), value.item(), rel_tol=1e-10), (site.name, name)
    assert math.isclose(report.dense_ce, dense_ce.item(), rel_tol=1e-10)
    assert math.isclose(report.sparse_ce, sparse_ce.item(), rel_tol=1e-10)
    assert math.isclose(report.kl_sparse_alone, alone.item(), rel_tol=1e-10)
    assert report.tokens == 17 and [site.name for site in report.sites] == pair.bridge_set.sites


def test_figures_do_not_depend_on_how_rows_are_batched():
    pair = PAIRS["equal depth"]()
    data = {"input_ids": tokens(9), "attention_mask": torch.cat([MASK, MASK, MASK[:1]])}
    whole = evaluate(*pair, data, batch_size=9)
    for batch_size in (1, 2, 4):
        one = evaluate(*pair, data, batch_size=batch_size)
        assert one.tokens == whole.tokens == 17 + 17 + 7
        for name, value in whole.flat().items():
            assert math.isclose(one.flat()[name], value, rel_tol=1e-10), name


def test_a_decoder_given_other_tokens_does_worse_than_the_mean():
    """Decoding y(x') for an independent x' misses by the sum of both variances: NMSE = 1 + var(g(z)) / var(h)."""
    model = gpt2()
    pair = identity(model)
    report = evaluate(*pair, tokens(64, 12))
    for site in report.sites:
        assert math.isclose(site.nmse_decode_shuffled, 2, rel_tol=1e-12)


def identity(model):
    """Bridges that change nothing, between a model and itself."""
    pair = join(model, model, k=model.config.hidden_size)
    for bridge in pair.bridge_set:
        with torch.no_grad():
            for weight in (bridge.encoder_weight, bridge.decoder_weight):
                weight.copy_(torch.eye(len(weight)))
            for bias in (bridge.encoder_bias, bridge.decoder_bias):
                bias.zero_()
    return pair


@pytest.mark.parametrize("build", [gpt2, neox, sparse_model])
def test_identity_bridges_between_a_model_and_itself_lose_nothing(build):
    report = evaluate(*identity(build()), DATA)
    for site in report.sites:
        assert site.nmse_encode == site.nmse_decode == site.nmse_encode_floor == 0
        assert abs(site.kl_dense_to_sparse) < 1e-14 and abs(site.kl_sparse_to_dense) < 1e-14
        assert site.ce_recovered_dense_to_sparse == site.ce_recovered_sparse_to_dense == 1
        assert site.kl_sparse_to_dense_mean_ablation == site.kl_dense_to_sparse_mean_ablation > 1e-4
    assert report.dense_ce == report.sparse_ce and abs(report.kl_sparse_alone) < 1e-14


def test_a_bridge_that_predicts_the_mean_has_nmse_1_and_the_figures_of_mean_ablation():
    pair = PAIRS["equal depth"]()
    n = len(pair.bridge_set)
    with torch.no_grad():
        counted = counted_places(tokens(), MASK)
        h, z = (model.residuals(tokens(), MASK)[0] for model in (pair.dense, pair.sparse))
        for i, bridge in enumerate(pair.bridge_set):
            bridge.encoder_weight.zero_()
            bridge.decoder_weight.zero_()
            bridge.encoder_bias.copy_(at(z[i], counted).mean(0))
            bridge.decoder_bias.copy_(at(h[i], counted).mean(0))
            bridge.k = pair.sparse.d_model
    for site in evaluate(*pair, DATA).sites:
        assert math.isclose(site.nmse_encode, 1, rel_tol=1e-12) and math.isclose(site.nmse_decode, 1, rel_tol=1e-12)
        assert math.isclose(site.nmse_decode_shuffled, 1, rel_tol=1e-12)
        for direction in ("dense_to_sparse", "sparse_to_dense"):
            kl = getattr(site, f"kl_{direction}")
            assert math.isclose(kl, getattr(site, f"kl_{direction}_mean_ablation"), rel_tol=1e-10)
            assert abs(getattr(site, f"ce_recovered_{direction}")) < 1e-10
    assert n == 5


def test_other_models_are_refused_unless_the_caller_insists():
    pair = PAIRS["equal depth"]()
    pair.bridge_set.record_models(pair.dense.model, pair.sparse.model)
    other = sparse_model(seed=99)
    with pytest.raises(ValueError, match="sparse=SparseTransformer is not the model"):
        evaluate(pair.dense, other, pair.bridge_set, DATA)
    insisted = evaluate(pair.dense, other, pair.bridge_set, DATA, check_models=False)
    expected = join(gpt2(), other)
    expected.bridge_set.load_state_dict(pair.bridge_set.state_dict())
    assert insisted.flat() == evaluate(*expected, DATA).flat()


def test_models_are_evaluated_without_dropout_and_left_in_their_modes():
    dense, sparse = gpt2(), sparse_model(dropout=0.5)
    pair = join(dense, sparse)
    expected = evaluate(*pair, DATA).flat()
    dense.train()
    sparse.train()
    sparse.blocks[1].eval()
    assert evaluate(dense, sparse, pair.bridge_set, DATA).flat() == expected
    assert dense.training and sparse.training and not sparse.blocks[1].training and sparse.blocks[0].training
    assert all(p.grad is None for p in pair.bridge_set.parameters())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (tokens(4, 12), "data has rows of 12 tokens, over the models' context of 9"),
        (tokens(4, 8) + 17, "data holds token"),
        (tokens(4, 1), "rows of 1 real token"),
    ],
)
def test_data_that_does_not_fit_the_models_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        evaluate(*join(gpt2(context=9), sparse_model()), rows)


@pytest.mark.parametrize("size", [0, -1, 2.0])
def test_a_batch_size_that_is_not_a_number_of_rows_is_refused(size, unchecked):
    with pytest.raises(ValueError, match=f"batch_size={size} must be a whole number"):
        evaluate(*join(gpt2(), sparse_model()), tokens(), batch_size=size)


def test_where_a_target_does_not_vary_nmse_is_nan_and_null_in_the_file(tmp_path):
    report = evaluate(*join(gpt2(), sparse_model()), tokens(1, 2))  # one counted token
    undefined = ("nmse_encode", "nmse_encode_floor", "nmse_decode", "nmse_decode_shuffled")
    for site in report.sites:
        assert all(math.isnan(getattr(site, name)) for name in undefined)
        assert math.isfinite(site.kl_sparse_to_dense) and math.isfinite(site.kl_dense_to_sparse)
    assert math.isnan(report.mean["nmse_decode"]) and math.isfinite(report.mean["kl_sparse_to_dense"])
    report.save(tmp_path / "report.json")
    stored = json.loads((tmp_path / "report.json").read_text())
    assert (
        [stored["sites"][0][name] for name in undefined] == [None] * 4 == [stored["mean"][name] for name in undefined]
    )


def test_models_are_given_as_objects_residual_models_or_folders(tmp_path):
    pair = join(gpt2(dtype=torch.float32), sparse_model(dtype=torch.float32))
    expected = evaluate(pair.dense, pair.sparse, pair.bridge_set, DATA).flat()
    pair.dense.model.save_pretrained(tmp_path / "dense")
    pair.sparse.model.save_pretrained(tmp_path / "sparse")
    assert evaluate(pair.dense.model, pair.sparse.model, pair.bridge_set, DATA).flat() == expected
    assert evaluate(str(tmp_path / "dense"), tmp_path / "sparse", pair.bridge_set, DATA).flat() == expected


def test_the_tokenizer_is_looked_for_where_the_model_was_named(tmp_path, monkeypatch):
    """A hub id's tokenizer is found, though the object loaded from it does not say where it comes from."""
    tokenizer = bridges.load_pair().tokenizer
    pair = join(gpt2(vocab=len(tokenizer)), sparse_model(vocab_size=len(tokenizer)))
    text = tmp_path / "text.txt"
    text.write_text("for i in range(3):\n    print(i)\n" * 9)
    expected = evaluate(*pair, text, tokenizer=tokenizer)
    tokenizer.save_pretrained(tmp_path / "cached")
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", lambda name: pair.dense.model)
    monkeypatch.setattr(loading, "cached_file", lambda name, *_, **__: name == "me/model")
    load, cached = loading.AutoTokenizer.from_pretrained, {"me/model": tmp_path / "cached"}
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lambda name: load(cached[name]))
    found = evaluate("me/model", pair.sparse.model, pair.bridge_set, text)
    assert found.flat() == expected.flat() and found.tokens > 0


def test_two_processes_measure_what_one_does_also_where_one_has_no_batch():
    pair = PAIRS["equal depth"]()
    whole = measure(pair, [(tokens(), MASK)])
    noted = []
    measure(pair, [(tokens(), MASK)], lambda sums: noted.append(sums.clone()) or sums)
    from_other = iter(noted)
    shared = measure(pair, [], lambda sums: sums + next(from_other))
    assert shared.flat() == whole.flat() and shared.tokens == whole.tokens == 17
    assert next(from_other, None) is None


def test_kls_are_measured_on_the_first_rows_and_nmses_on_all():
    pair, ids = PAIRS["equal depth"](), tokens(12, 8)
    found = evaluate(*pair, ids, kl_tokens=20, progress=False)  # three rows of 8
    few, every = (evaluate(*pair, rows, kl_tokens=1000, progress=False) for rows in (ids[:3], ids))
    assert (found.tokens, found.nmse_tokens) == (24, 12 * 7) and every.tokens == 96
    for one, other, whole in zip(found.sites, few.sites, every.sites, strict=True):
        assert math.isclose(one.kl_dense_to_sparse, other.kl_dense_to_sparse, rel_tol=1e-10)
        assert math.isclose(one.nmse_decode, whole.nmse_decode, rel_tol=1e-10)
        assert one.kl_dense_to_sparse_se > whole.kl_dense_to_sparse_se
    with pytest.raises(ValueError, match="kl_tokens=0 must be a whole number of tokens, at least 1, or 'auto'"):
        evaluate(*pair, ids, kl_tokens=0)


def test_a_budget_of_computation_says_how_many_rows_the_kls_take(monkeypatch):
    pair = PAIRS["equal depth"]()
    assert affordable_kl_rows(pair, 1000, 100) == 1000  # two tiny models
    cost = 0.0  # two tails of each model at every site: twice a weight for each, half of them on average
    for model in (pair.dense, pair.sparse):
        head = model.d_model * model.vocab_size
        body = sum(p.numel() for p in model.model.parameters()) - head
        cost += sum(2 * 2 * (body * left + head) for left in (1, 0.75, 0.5, 0.25, 0))
    monkeypatch.setitem(evaluate_module.KL_FLOP, "cpu", 7.5 * 100 * cost)
    assert affordable_kl_rows(pair, 1000, 100) == 7
    assert affordable_kl_rows(pair, 5, 100) == 5
    monkeypatch.setitem(evaluate_module.KL_FLOP, "cpu", 1.0)
    assert affordable_kl_rows(pair, 1000, 100) == 4 and affordable_kl_rows(pair, 2, 100) == 2


@pytest.mark.parametrize("build", PAIRS.values(), ids=PAIRS)
def test_passes_that_change_sides_several_times(build):
    pair = build()
    n = len(pair.bridge_set)
    asked = ["sd" * n, "ds" * n, "d" * (n + 1), "s" + "d" * (n - 1) + "s"]
    asked = [path[: n + 1] for path in asked]
    report = evaluate(pair.dense, pair.sparse, pair.bridge_set, DATA, batch_size=1, paths=asked)
    assert [figures.path for figures in report.paths] == asked
    assert [figures.changes for figures in report.paths] == [n, n, 0, 2]
    for figures in report.paths:
        expected = naive_path_kl(pair, figures.path, tokens(), MASK).item()
        assert figures.kl == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert report == bridges.BridgeReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert f"{n}: " in str(report) and "changes of side" in str(report)


def test_a_number_of_paths_draws_them_and_they_change_sides_twice_or_more():
    pair = PAIRS["equal depth"]()
    one, two = (evaluate(pair.dense, pair.sparse, pair.bridge_set, DATA, paths=9).paths for _ in range(2))
    assert one == two and sorted({figures.changes for figures in one}) == [2, 3, 4, 5]


def test_a_negative_number_of_paths_is_refused():
    pair = PAIRS["equal depth"]()
    with pytest.raises(ValueError, match=r"paths=-1 must be a number of paths"):
        evaluate(pair.dense, pair.sparse, pair.bridge_set, DATA, paths=-1)


@pytest.mark.parametrize("paths", [["ds"], ["dxdddd"], ["dddddd", ("dense", "sparse")]])
def test_paths_that_do_not_fit_are_refused(paths):
    pair = PAIRS["equal depth"]()
    with pytest.raises(ValueError, match=r"must name 6 sides, 'dense' or 'sparse'"):
        evaluate(pair.dense, pair.sparse, pair.bridge_set, DATA, paths=paths)
