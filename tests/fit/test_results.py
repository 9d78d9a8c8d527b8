import pytest
import torch
from fits import DATA, SPARSE, files, run, same, shallow
from pairs import join, naive_objective, relative, sparse_model
from transformers import AutoModelForCausalLM

from bridges.bridge import BridgeSet
from bridges.evaluate import evaluate
from bridges.fitting.gradients import Weights
from bridges.models import loading
from bridges.models.loading import as_residual
from bridges.models.sparse.model import SparseTransformer
from bridges.models.sparse.residual import SparseResidual
from bridges.sparsity import projection as sparsity


def standardised_by_hand(pair, rows):
    """Per bridge mean and deviation of both streams over counted tokens."""
    with torch.no_grad():
        traces = [model.residuals(rows)[0] for model in (pair.dense, pair.sparse)]
    streams = zip(*([h[:, 1:].flatten(0, 1) for h in residuals] for residuals in traces), strict=True)
    return [[(x.mean(0), x.std(0, unbiased=False)) for x in both] for both in streams]


def test_one_step_from_random_maps_is_adamw_on_the_naive_gradient_between_standardised_streams():
    """Adam's first step is lr g / (|g| + eps), whatever its betas."""
    weights = Weights(0.5, 1.5, 2.0, 1.0)
    found = run(
        steps=1,
        closed_form=False,
        sites_per_step="all",
        k=3,
        lr=1e-2,
        nmse_weight=0.5,
        kl_dense_to_sparse_weight=1.5,
        kl_sparse_to_dense_weight=2.0,
    )
    pair = join(shallow(), shallow(sparse_model), k=3)
    # One row of 12 is held out, and one set aside.
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    scales = standardised_by_hand(pair, DATA[order])
    generator, maps = torch.Generator().manual_seed(0), []
    for bridge, ((mean_h, std_h), (mean_z, std_z)) in zip(pair.bridge_set, scales, strict=True):
        bridge.randomize(generator)  # of the standardised maps
        for weight, bias, mean, std, to_mean, to_std in (
            (bridge.encoder_weight, bridge.encoder_bias, mean_h, std_h, mean_z, std_z),
            (bridge.decoder_weight, bridge.decoder_bias, mean_z, std_z, mean_h, std_h),
        ):
            own = [tensor.detach().clone().requires_grad_() for tensor in (weight, bias)]
            plain = to_std[:, None] * own[0] / std
            maps.append(
                (own, (weight, bias), (plain, to_mean + to_std * own[1] - plain @ mean), (mean, std, to_mean, to_std))
            )
            with torch.no_grad():
                weight.copy_(maps[-1][2][0])
                bias.copy_(maps[-1][2][1])
    loss, _ = naive_objective(pair, weights, DATA[order[:4]])
    loss.backward()
    for own, parameters, plain, (mean, std, to_mean, to_std) in maps:
        gradients = torch.autograd.grad(plain, own, [p.grad for p in parameters])
        weight, bias = (p.detach() - 1e-2 * g / (g.abs() + 1e-8) for p, g in zip(own, gradients, strict=True))
        with torch.no_grad():
            parameters[0].copy_(to_std[:, None] * weight / std)
            parameters[1].copy_(to_mean + to_std * bias - parameters[0] @ mean)
    assert found.report.selection["step"] == 1  # the step has made the rows set aside better
    for expected, parameter in zip(pair.bridge_set.parameters(), found.parameters(), strict=True):
        assert relative(parameter.detach(), expected.detach()) < 1e-8
    assert abs(found.history[0]["train/loss"] / loss.item() - 1) < 1e-10


def test_the_closed_form_alone_is_complete(tmp_path):
    dense, sparse = shallow(), shallow(sparse_model)
    found = run(dense=dense, sparse=sparse, steps=0, output_dir=tmp_path / "run")
    assert found.history == [] and found.report.tokens == 8 and (tmp_path / "run/metrics.jsonl").read_text() == ""
    assert all(bridge.rms_dense > 0 and bridge.rms_sparse > 0 for bridge in found)
    heldout = evaluate(dense, sparse, found, DATA[11:], progress=False)
    assert heldout == found.report
    assert same(BridgeSet.from_pretrained(tmp_path / "run"), found)


def test_gradient_steps_improve_what_they_train_on():
    """Trained on the objective's KLs alone, both fall on the rows trained on; the closed form was blind to them."""
    everything = {"eval_data": DATA, "sites_per_step": "all", "nmse_weight": 0.0, "lr": 3e-2}
    before, after = (run(**everything, steps=steps).report.mean for steps in (0, 12))
    assert after["kl_dense_to_sparse"] < 0.97 * before["kl_dense_to_sparse"]
    assert after["kl_sparse_to_dense"] < 0.97 * before["kl_sparse_to_dense"]


def test_the_learning_rate_falls_linearly_from_the_first_step():
    history = run(steps=4, lr=0.02).history
    assert [row["step"] for row in history] == [1, 2, 3, 4]
    assert [row["lr"] for row in history] == pytest.approx([0.02, 0.015, 0.01, 0.005])


def test_report_and_history_survive_saving(tmp_path):
    found = run(eval_every=2)
    found.save_pretrained(tmp_path)
    again = BridgeSet.from_pretrained(tmp_path)
    assert again.report == found.report and again.history == found.history and same(again, found)
    assert found.provenance["fit"]["lr"] == 1e-3 and len(found.history) == 3


def test_joint_training_reaches_the_density_and_writes_the_sparse_model(tmp_path):
    sparse = shallow(sparse_model)
    start = [p.detach().clone() for p in sparse.parameters()]
    found = run(sparse=sparse, **{**SPARSE, "target_density": 0.25}, steps=4, output_dir=tmp_path / "run")
    for name, parameter in sparsity.sparse_parameters(sparse):
        count = max(1, round(0.25 * parameter.numel()))
        channels = next((d for suffix, d in sparsity.CHANNEL_DIM.items() if name.endswith(suffix)), None)
        floor = 0 if channels is None else 4 * parameter.shape[channels]
        assert int(torch.count_nonzero(parameter)) <= max(count, floor)
        assert channels is not None or int(torch.count_nonzero(parameter)) == count
    loaded = SparseTransformer.from_pretrained(tmp_path / "run/sparse")
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), sparse.parameters(), strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(start, sparse.parameters(), strict=True))
    assert [row["kept_fraction"] for row in found.history] == [0.625, 0.25, 0.25, 0.25]
    evaluate(shallow(), sparse, found, DATA)  # the fingerprint is that of the trained model


def test_without_a_target_density_zeros_stay_and_the_rest_trains():
    sparse = shallow(sparse_model)
    sparsity.project(sparse, 0.4)
    before = {name: p.detach().clone() for name, p in sparsity.sparse_parameters(sparse)}
    run(sparse=sparse, train_sparse=True)
    for name, parameter in sparsity.sparse_parameters(sparse):
        assert torch.equal(parameter == 0, before[name] == 0)
    embedding, start = sparse.transformer.wte.weight, before["transformer.wte.weight"]
    assert (embedding != start).sum() > 0.9 * (start != 0).sum()


def test_a_tensor_that_is_zero_throughout_stays_so_where_zeros_are_kept():
    """As the biases of a fresh model: none of their entries trains."""
    sparse = shallow(sparse_model)
    with torch.no_grad():
        sparse.transformer.h[0].mlp.c_fc.bias.zero_()
    before = sparse.transformer.h[0].mlp.c_fc.weight.clone()
    run(sparse=sparse, train_sparse=True)
    assert not sparse.transformer.h[0].mlp.c_fc.bias.any()
    assert not torch.equal(sparse.transformer.h[0].mlp.c_fc.weight, before)


def test_without_data_rows_are_sampled_from_the_dense_model_by_seed():
    found = run(None, steps=1, sampled_rows=40, seq_len=6)
    assert same(found, run(None, steps=1, sampled_rows=40, seq_len=6))
    assert found.report.tokens == 32 * 6 and not same(found, run(None, steps=1, sampled_rows=40, seq_len=6, seed=1))
    assert run(None, steps=0, sampled_rows=20).report.tokens == 32 * 12  # the whole context


@pytest.mark.parametrize("form", ["list", "dicts", "loader"])
def test_batches_from_an_iterable_give_the_bridges_of_one_tensor(form):
    data = {
        "list": list(DATA.split(5)),
        "dicts": [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in DATA.split(7)],
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(DATA), batch_size=4),
    }[form]
    assert same(run(data), run())


def model_in_folder(model, folder, **options):
    model.save_pretrained(folder, **options)
    return model


@pytest.mark.parametrize("kind", ["object", "ResidualModel", "folder", "name of a folder"])
def test_models_may_be_given_in_every_way(tmp_path, kind):
    dense = model_in_folder(shallow(dtype=torch.float32), tmp_path / "dense")
    sparse = model_in_folder(shallow(sparse_model, dtype=torch.float32), tmp_path / "sparse", sparse=True)
    given = {
        "object": lambda model, name: model,
        "ResidualModel": lambda model, name: as_residual(model),
        "folder": lambda model, name: tmp_path / name,
        "name of a folder": lambda model, name: str(tmp_path / name),
    }[kind]
    found = run(dense=given(dense, "dense"), sparse=given(sparse, "sparse"))
    assert same(found, run(dense=dense, sparse=sparse))
    if "folder" in kind:
        assert [found.provenance[side]["name"] for side in ("dense", "sparse")] == ["dense", "sparse"]


def test_a_model_by_hub_id_is_loaded_from_the_hub(tmp_path, monkeypatch):
    """`transformers` is asked for the id as it stands; a folder answers for the hub here."""
    dense = model_in_folder(shallow(dtype=torch.float32), tmp_path / "dense")
    asked, load = [], AutoModelForCausalLM.from_pretrained

    def from_hub(name, **kwargs):
        asked.append(name)
        return load(tmp_path / "dense", **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_hub)
    monkeypatch.setattr(loading, "cached_file", lambda *args, **kwargs: None)  # no tokenizer lies with it
    sparse = shallow(sparse_model, dtype=torch.float32)
    assert same(run(dense="owner/dense", sparse=sparse), run(dense=dense, sparse=sparse))
    assert asked == ["owner/dense"]


def test_a_residual_model_is_used_as_it_is():
    """Its own sublayers run: here the MLP's output is doubled by the `ResidualModel` alone."""

    class Doubled(SparseResidual):
        def sublayer(self, index, residual, context):
            out = super().sublayer(index, residual, context)
            return 2 * out - residual if index == 1 else out

    sparse = shallow(sparse_model)
    assert not same(run(sparse=Doubled(sparse)), run(sparse=sparse))


def test_the_sparse_model_of_a_residual_model_trains():
    one, other = shallow(sparse_model), shallow(sparse_model)
    assert same(run(sparse=as_residual(one), **SPARSE), run(sparse=other, **SPARSE))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_bridges_have_the_wider_dtype_and_at_least_float32():
    for dense, sparse, expected in (
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ):
        found = run(dense=shallow(dtype=dense), sparse=shallow(sparse_model, dtype=sparse), steps=1)
        assert found[0].encoder_weight.dtype == expected


def test_the_same_settings_give_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        run(**SPARSE, output_dir=tmp_path / name)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert len(files(tmp_path / "one")) >= 6
