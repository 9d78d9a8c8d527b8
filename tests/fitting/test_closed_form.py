import pytest
import torch
from pairs import MASK, at, counted_places, gpt2, join, neox, sparse_model, tokens

from bridges.fitting.closed_form import (
    DEFAULT_RIDGE,
    ReadScales,
    measure_read_scales,
    site_groups,
    solve_bridges,
    standardize,
)
from bridges.fitting.ridge import RIDGES


@pytest.fixture
def pair():
    return join(gpt2(), sparse_model())


def batches(rows=48, width=10):
    """Padded and whole batches, more counted tokens than channels."""
    ids = tokens(rows, width, seed=11)
    mask = torch.ones_like(ids)
    mask[::3, :4] = 0
    mask[1::3, 7:] = 0
    return [(ids[i : i + 16], None if i == 32 else mask[i : i + 16]) for i in range(0, rows, 16)]


def rows_at(pair, i):
    """All counted (dense, sparse) rows of one bridged site, gathered one by one."""
    dense_site, sparse_site = pair.bridge_set.site_pairs[i]
    dense, sparse = [], []
    with torch.no_grad():
        for ids, mask in batches():
            places = counted_places(ids, mask)
            dense.append(at(pair.dense.residuals(ids, mask)[0][pair.dense.sites.index(dense_site)], places))
            sparse.append(at(pair.sparse.residuals(ids, mask)[0][pair.sparse.sites.index(sparse_site)], places))
    return torch.cat(dense), torch.cat(sparse)


def ridge_regression(x, y, ridge):
    """Ridge by stacking sqrt(penalty) rows under the standardised design, then QR; in plain weights."""
    std = x.std(0, unbiased=False)
    design = torch.cat([(x - x.mean(0)) / std, (ridge * len(x)) ** 0.5 * torch.eye(x.shape[1], dtype=x.dtype)])
    target = torch.cat([y - y.mean(0), torch.zeros(x.shape[1], y.shape[1], dtype=y.dtype)])
    weight = torch.linalg.lstsq(design, target).solution.T / std
    return weight, y.mean(0) - weight @ x.mean(0)


def test_every_site_gets_its_ridge_regression_in_both_directions_and_no_abs_topk(pair):
    """The encoder's target is the stream before AbsTopK: the solution is that of the affine map alone."""
    solve_bridges(pair, batches(), ridge=1e-3, memory_bytes=1e9)
    for i, bridge in enumerate(pair.bridge_set):
        dense, sparse = rows_at(pair, i)
        for found, expected in (
            ((bridge.encoder_weight, bridge.encoder_bias), ridge_regression(dense, sparse, 1e-3)),
            ((bridge.decoder_weight, bridge.decoder_bias), ridge_regression(sparse, dense, 1e-3)),
        ):
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one.detach(), other, rtol=1e-8, atol=1e-9)


def test_groups_of_sites_give_what_one_group_gives_at_a_pass_each(pair):
    class Passes(list):
        count = 0

        def __iter__(self):
            self.count += 1
            return super().__iter__()

    once, grouped = Passes(batches()), Passes(batches())
    solve_bridges(pair, once, ridge=1e-4, memory_bytes=1e9)
    whole = {name: t.clone() for name, t in pair.bridge_set.tensors().items()}
    for tensor in pair.bridge_set.parameters():
        tensor.data.zero_()
    solve_bridges(pair, grouped, ridge=1e-4, memory_bytes=2.5 * 24 * (8**2 + 12**2 + 8 * 12))
    assert (once.count, grouped.count) == (1, 3)
    for name, tensor in pair.bridge_set.tensors().items():
        if "rms" not in name and "gain" not in name:  # measured by measure_read_scales
            assert torch.equal(tensor, whole[name])


def test_groups_are_as_large_as_memory_allows_and_never_empty(pair):
    per_site = 24 * (8**2 + 12**2 + 8 * 12)
    assert list(site_groups(pair, 3.5 * per_site)) == [[0, 1, 2], [3, 4]]
    assert list(site_groups(pair, 1.0)) == [[0], [1], [2], [3], [4]]


@pytest.mark.parametrize("build", [lambda: join(gpt2(), sparse_model()), lambda: join(neox(), sparse_model())])
def test_rms_is_the_mean_over_counted_tokens_of_the_rms_after_centring(build):
    """GPT-2 and GPT-NeoX have LayerNorms, which subtract the mean over channels; an RMSNorm does not."""
    pair = build()
    measure_read_scales(pair, batches())
    for i, bridge in enumerate(pair.bridge_set):
        dense, sparse = rows_at(pair, i)
        by_hand = sum(((row - row.mean()) ** 2).mean().sqrt() for row in dense) / len(dense)
        torch.testing.assert_close(bridge.rms_dense, by_hand, rtol=1e-12, atol=0)
        by_hand = sum((row**2).mean().sqrt() for row in sparse) / len(sparse)
        torch.testing.assert_close(bridge.rms_sparse, by_hand, rtol=1e-12, atol=0)


def test_rms_is_centred_where_the_sparse_model_has_layer_norms():
    pair = join(gpt2(), sparse_model(rms_norm=False))
    measure_read_scales(pair, [(tokens(), MASK)])
    site = pair.sparse.residuals(tokens(), MASK)[0][1].detach()
    rows = at(site, counted_places(tokens(), MASK))
    by_hand = sum(((row - row.mean()) ** 2).mean().sqrt() for row in rows) / len(rows)
    torch.testing.assert_close(pair.bridge_set[1].rms_sparse, by_hand, rtol=1e-12, atol=0)


def test_rms_is_one_where_no_norm_comes_before_the_sublayer():
    from transformers import Olmo2Config, Olmo2ForCausalLM

    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    dense = Olmo2ForCausalLM(Olmo2Config(**shape, num_key_value_heads=2, vocab_size=17, pad_token_id=0)).double()
    pair = join(dense.eval(), sparse_model(layers=1))
    measure_read_scales(pair, batches())
    assert [bridge.rms_dense.item() == 1 for bridge in pair.bridge_set] == [True, True, False]


class OtherProcess:
    """Records the sums of a process that has every batch, then adds them to those of one that has none."""

    def __init__(self):
        self.sums = []

    def record(self, sums):
        self.sums.append(sums.clone())
        return sums

    def add(self, sums):
        return sums + self.sums.pop(0)


@pytest.mark.parametrize("what", ["bridges", "read scales"])
def test_a_process_without_batches_ends_with_the_sums_of_the_others(pair, what):
    other = OtherProcess()
    runs = {
        "bridges": lambda rows, reduce: solve_bridges(pair, rows, 1e-3, 1e9, reduce),
        "read scales": lambda rows, reduce: measure_read_scales(pair, rows, reduce),
    }
    runs[what](batches(), other.record)
    whole = {name: t.clone() for name, t in pair.bridge_set.tensors().items()}
    for name, tensor in pair.bridge_set.tensors().items():
        if "norm_limit" not in name:
            tensor.data.zero_()
    runs[what]([], other.add)
    assert not other.sums
    measured = ("rms_dense", "rms_sparse", "gain_sparse")
    for name, tensor in pair.bridge_set.tensors().items():
        if name.endswith(measured) == (what == "read scales"):
            torch.testing.assert_close(tensor, whole[name], rtol=1e-12, atol=1e-14)


def test_read_scales_measured_in_the_pass_over_the_moments_are_those_of_a_pass_of_their_own(pair):
    scales = ReadScales(pair)
    solve_bridges(pair, batches(), 1e-3, 1.0, read_scales=scales)  # one site a group
    scales.store()
    found = {name: t.clone() for name, t in pair.bridge_set.tensors().items()}
    measure_read_scales(pair, batches())
    for name, tensor in pair.bridge_set.tensors().items():
        torch.testing.assert_close(tensor, found[name], rtol=1e-14, atol=0)


def test_the_ridge_of_every_site_and_direction_is_chosen_on_the_selection(pair):
    selection = [(tokens(5, 9, seed=8), None)]
    found = solve_bridges(pair, batches(), "auto", 1e9, selection=selection)
    with torch.no_grad():
        for i, bridge in enumerate(pair.bridge_set):
            dense, sparse = rows_at(pair, i)
            other_dense, other_sparse = (
                model.residuals(selection[0][0])[0][model.sites.index(site)][:, 1:].flatten(0, 1)
                for model, site in zip((pair.dense, pair.sparse), pair.bridge_set.site_pairs[i], strict=True)
            )
            for ridge, weight, (x, y, other_x, other_y) in (
                (found.ridges[i][0], bridge.encoder_weight, (dense, sparse, other_dense, other_sparse)),
                (found.ridges[i][1], bridge.decoder_weight, (sparse, dense, other_sparse, other_dense)),
            ):
                errors = {}
                for candidate in RIDGES:
                    w, b = ridge_regression(x, y, candidate)
                    errors[candidate] = (other_x @ w.T + b - other_y).square().sum().item()
                variance = (other_y - y.mean(0)).square().sum().item()
                assert ridge == max(r for r in RIDGES if errors[r] <= 1.01 * min(errors.values()) + 1e-9 * variance)
                torch.testing.assert_close(weight, ridge_regression(x, y, ridge)[0], rtol=1e-6, atol=1e-8)


def test_streams_are_standardised_by_their_mean_and_deviation(pair):
    found = solve_bridges(pair, batches(), 1e-3, 1e9).standardizations
    again = standardize(pair, batches(), 1.0)
    for i, sides in enumerate(found):
        for side, twin, x in zip(sides, again[i], rows_at(pair, i), strict=True):
            torch.testing.assert_close(side.mean, x.mean(0), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(side.std, x.std(0, unbiased=False), rtol=1e-8, atol=1e-12)
            torch.testing.assert_close(side.std, twin.std, rtol=1e-12, atol=0)


@pytest.mark.parametrize("ridge", ["auto", 1e-3])
@pytest.mark.parametrize("side", ["training", "selection"])
def test_a_token_that_is_not_finite_is_named_with_the_rows_that_hold_it(pair, side, ridge):
    with torch.no_grad():
        pair.dense.model.transformer.wte.weight[12] = float("nan")
    ids = tokens(12, 8, seed=3)
    ids[ids == 12] = 1
    broken = ids.clone()
    broken[2, 3] = 12
    rows = (broken, ids) if side == "training" else (ids, broken)
    where = "; look for" if side == "training" else " on the training rows set aside; look for"
    with pytest.raises(FloatingPointError, match=rf"at site 0\.attn is not finite{where}"):
        solve_bridges(pair, [(rows[0], None)], ridge, 1e9, selection=[(rows[1], None)])


def test_without_rows_to_judge_on_the_penalty_is_the_default(pair):
    assert solve_bridges(pair, batches(), "auto", 1e9).ridges == [(DEFAULT_RIDGE, DEFAULT_RIDGE)] * 5
