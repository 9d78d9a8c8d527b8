import json
import os
import signal
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from pairs import gpt2, join, naive_objective, relative, sparse_model, tokens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from bridges.bridge import BridgeSet
from bridges.config import FitConfig
from bridges.evaluate import evaluate
from bridges.fit import fit
from bridges.fitting.gradients import Weights
from bridges.fitting.trainer import Trainer
from bridges.models.sparse.model import SparseTransformer
from bridges.sparsity import projection as sparsity

fit_module = import_module("bridges.fit")  # as an attribute of the package it is the function
DATA = tokens(12, 8, seed=21)
BASE = {"steps": 3, "batch_size": 4, "closed_form_tokens": 100, "lr": 1e-2, "progress": False}
SPARSE = {"train_sparse": True, "target_density": 0.5}


def shallow(model=gpt2, **options):
    return model(layers=1, **options)


def run(data=DATA, dense=None, sparse=None, **settings):
    return fit(dense or shallow(), sparse or shallow(sparse_model), data, **{**BASE, **settings})


def outcome(bridge_set):
    """Every parameter, R and figure in one row of numbers."""
    figures = torch.tensor(list(bridge_set.report.flat().values()), dtype=torch.float64)
    return torch.cat([*(tensor.double().flatten() for tensor in bridge_set.tensors().values()), figures])


def same(one, other):
    return one.site_pairs == other.site_pairs and torch.equal(outcome(one), outcome(other))


def rows(folder):
    """The rows of `metrics.jsonl` without the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def files(folder):
    """What a run leaves that must not depend on the clock or on interruptions."""
    names = ["bridges.safetensors", "report.json", "config.json", "README.md", "quality.png", "sparse/nonzeros"]
    found = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    return found | {file.name: file.read_bytes() for file in folder.glob("sparse/*.safetensors")}


# What a fit computes.


def test_one_step_from_random_maps_is_adamw_on_the_naive_gradient():
    """Adam's first step is lr g / (|g| + eps), whatever its betas."""
    weights = Weights(0.5, 1.5, 2.0, 1.0)
    found = run(
        steps=1,
        closed_form=False,
        sites_per_step="all",
        k=3,
        nmse_weight=0.5,
        kl_dense_to_sparse_weight=1.5,
        kl_sparse_to_dense_weight=2.0,
    )
    pair = join(shallow(), shallow(sparse_model), k=3)
    generator = torch.Generator().manual_seed(0)
    for bridge in pair.bridge_set:
        bridge.randomize(generator)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))  # one row of 12 is held out
    loss, _ = naive_objective(pair, weights, DATA[order[:4]])
    loss.backward()
    for expected, parameter in zip(pair.bridge_set.parameters(), found.parameters(), strict=True):
        step = 1e-2 * expected.grad / (expected.grad.abs() + 1e-8)
        assert relative(parameter.detach(), expected.detach() - step) < 1e-9
    assert abs(found.history[0]["train/loss"] / loss.item() - 1) < 1e-12


def test_the_closed_form_alone_is_complete(tmp_path):
    dense, sparse = shallow(), shallow(sparse_model)
    found = run(dense=dense, sparse=sparse, steps=0, output_dir=tmp_path / "run")
    assert found.history == [] and found.report.tokens == 8 and (tmp_path / "run/metrics.jsonl").read_text() == ""
    assert all(bridge.rms_dense > 0 and bridge.rms_sparse > 0 for bridge in found)
    heldout = evaluate(dense, sparse, found, DATA[11:])
    assert heldout.flat() == found.report.flat()
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
    assert found.provenance["fit"]["lr"] == 1e-2 and len(found.history) == 3


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


def test_without_data_the_dense_model_writes_it():
    found = run(None, steps=1, sampled_rows=40, seq_len=6)
    assert same(found, run(None, steps=1, sampled_rows=40, seq_len=6))
    assert found.report.tokens == 2 * 6 and not same(found, run(None, steps=1, sampled_rows=40, seq_len=6, seed=1))
    assert run(None, steps=0, sampled_rows=20).report.tokens == 12  # one row of the whole context


@pytest.mark.parametrize("form", ["list", "dicts", "loader"])
def test_iterables_are_tensors_to_it(form, unturned):
    data = {
        "list": list(DATA.split(5)),
        "dicts": [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in DATA.split(7)],
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(DATA), batch_size=4),
    }[form]
    assert same(run(data), unturned["frozen"])


def test_models_by_path_are_models(tmp_path):
    dense, sparse = shallow(dtype=torch.float32), shallow(sparse_model, dtype=torch.float32)
    dense.save_pretrained(tmp_path / "dense")
    sparse.save_pretrained(tmp_path / "sparse", sparse=True)
    found = run(dense=str(tmp_path / "dense"), sparse=tmp_path / "sparse")
    assert same(found, run(dense=dense, sparse=sparse))
    assert found.provenance["dense"]["name"] == "dense" and found.provenance["sparse"]["name"] == "sparse"


def test_bridges_have_the_wider_dtype_and_at_least_float32():
    for dense, sparse, expected in (
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ):
        found = run(dense=shallow(dtype=dense), sparse=shallow(sparse_model, dtype=sparse), steps=1)
        assert found[0].encoder_weight.dtype == expected


# Every knob turns something.

KNOBS = {
    "steps": (2, {}),
    "batch_size": (3, {}),
    "gradient_accumulation_steps": (2, {}),
    "seq_len": (6, {}),
    "lr": (2e-2, {}),
    "seed": (1, {}),
    "k": (3, {}),
    "closed_form": (False, {}),
    "closed_form_tokens": (60, {}),
    "ridge": (1e-2, {}),
    "sites": (("0.mlp",), {}),
    "site_map": ((("0.mlp", "0.attn"), ("final", "final")), {}),
    "sites_per_step": (1, {}),
    "nmse_weight": (0.5, {}),
    "kl_dense_to_sparse_weight": (0.5, {}),
    "kl_sparse_to_dense_weight": (0.5, {}),
    "ce_weight": (0.0, SPARSE),
    "train_sparse": (True, {}),
    "target_density": (0.3, SPARSE),
    "start_density": (0.6, SPARSE),
    "anneal": (1.0, SPARSE),
    "interchange_weight": (0.5, {}),
    "interchange_pairs": (5, {"interchange_weight": 0.5}),
    "sparse_lr": (1e-3, SPARSE),
    "sparse_weight_decay": (5.0, SPARSE),
    "sparse_eps": (1e-2, SPARSE),
    "mixed_precision": ("bf16", {"dense": shallow(dtype=torch.float32)}),
    "eval_tokens": (8, {"eval_data": tokens(4, 8)}),
    "sampled_rows": (30, {"data": None, "steps": 1, "sampled_rows": 20}),
}
ELSEWHERE = {
    "moments_gib": "test_groups_by_memory_change_nothing",
    "eval_every": "test_held_out_figures_come_every_so_many_steps",
    "checkpoint_every": "test_checkpoints_come_every_so_many_steps_and_two_are_kept",
    "output_dir": "test_without_output_dir_nothing_is_written",
    "resume": "test_a_run_ended_by_ctrl_c_continues_to_the_same_bytes",
    "report_to": "training/test_tracking.py",
    "progress": "test_the_plan_and_a_bar_are_shown_on_stderr_alone",
}


def test_no_knob_is_left_out():
    assert KNOBS.keys() | ELSEWHERE.keys() == FitConfig.model_fields.keys()
    assert all(name in globals() for name in ELSEWHERE.values() if name.startswith("test_"))


@pytest.fixture(scope="module")
def unturned():
    """The runs that most knobs are compared with."""
    return {"frozen": run(), "training": run(**SPARSE)}


@pytest.mark.parametrize("knob", KNOBS)
def test_a_knob_turns_something(knob, unturned):
    value, settings = KNOBS[knob]
    shared = "training" if settings is SPARSE else "frozen" if not settings else None
    before = run(**settings) if shared is None else unturned[shared]
    assert not same(before, run(**{**settings, knob: value}))


def test_the_same_settings_give_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        run(**SPARSE, output_dir=tmp_path / name)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert len(files(tmp_path / "one")) >= 6


def test_groups_by_memory_change_nothing(monkeypatch):
    calls, module = [], import_module("bridges.fitting.closed_form")
    gather = module.gather
    monkeypatch.setattr(module, "gather", lambda *args: calls.append(1) or gather(*args))
    assert same(run(steps=0), run(steps=0, moments_gib=1e-9))
    assert len(calls) == 1 + 3


def test_mixed_precision_stays_near():
    exact, mixed = (run(dense=shallow(dtype=torch.float32), sparse=shallow(sparse_model, dtype=torch.float32), steps=1,
                        mixed_precision=precision).report.mean for precision in ("no", "bf16"))  # fmt: skip
    assert abs(mixed["nmse_decode"] / exact["nmse_decode"] - 1) < 0.1


def test_a_config_and_settings_over_it():
    config = FitConfig(**{**BASE, "steps": 9, "lr": 3e-2})
    assert same(fit(shallow(), shallow(sparse_model), DATA, config=config, steps=2), run(steps=2, lr=3e-2))


def test_held_out_figures_come_every_so_many_steps(tmp_path):
    run(steps=5, eval_every=2, output_dir=tmp_path / "run")
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found if "eval/mean/nmse_decode" in row] == [2, 4]
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    assert {"eval/kl_sparse_to_dense/0.mlp", "eval/nmse_encode/final", "eval/dense_ce"} <= found[1].keys()


def test_checkpoints_come_every_so_many_steps_and_two_are_kept(tmp_path):
    run(steps=5, checkpoint_every=2, output_dir=tmp_path / "run")
    assert sorted(f.name for f in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000004", "step-00000005"]


def test_the_plan_and_a_bar_are_shown_on_stderr_alone(capfd):
    run(steps=1)
    assert capfd.readouterr() == ("", "")
    run(steps=1, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "3 sites" in err and "1 steps of 4 rows" in err and "1/1" in err


def test_without_output_dir_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(eval_every=1, checkpoint_every=1)
    assert list(tmp_path.iterdir()) == []


# What a fit leaves alone.


def mixed_modes():
    """A model some of whose parts train and some of whose parameters ask for gradients."""
    dense, sparse = shallow(dtype=torch.float32), shallow(sparse_model, dtype=torch.float32)
    for model in (dense, sparse):
        model.train()
        next(model.children()).eval()
        for i, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(i % 2 == 0)
    return dense, sparse


def state_of(model):
    modes = [module.training for module in model.modules()]
    return modes, [p.requires_grad for p in model.parameters()], [p.grad is None for p in model.parameters()]


@pytest.mark.parametrize("ending", ["well", "refused", "not finite", "interrupted", "well, sparse trains"])
def test_models_are_left_as_they_were(ending, monkeypatch):
    dense, sparse = mixed_modes()
    models, joint = (dense, sparse), ending == "well, sparse trains"
    states, weights = [state_of(m) for m in models], [[p.detach().clone() for p in m.parameters()] for m in models]
    if ending == "interrupted":
        monkeypatch.setattr(fit_module, "measure", _raise(KeyboardInterrupt))
    errors = {"refused": ValueError, "not finite": FloatingPointError, "interrupted": KeyboardInterrupt}
    data = DATA + 40 if ending == "refused" else DATA
    try:
        run(data, dense=dense, sparse=sparse, lr=1e30 if ending == "not finite" else 1e-2, train_sparse=joint)
        assert ending not in errors
    except tuple(errors.values()) as error:
        assert type(error) is errors[ending]
    assert [state_of(m) for m in models] == states
    for model, before in zip(models, weights, strict=True):
        unchanged = all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert unchanged == (not joint or model is dense)


def _raise(error):
    def raiser(*args, **kwargs):
        raise error

    return raiser


# What is refused before anything is computed or written.


def word_tokenizer(words):
    table = {word: i for i, word in enumerate(["<unk>", *words])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(table, "<unk>")), unk_token="<unk>")


def two_tokenizers(folder):
    for name, model, words in (("dense", gpt2(), "a b"), ("sparse", sparse_model(), "a c")):
        model.save_pretrained(folder / name)
        word_tokenizer(words.split()).save_pretrained(folder / name)
    return {"dense": folder / "dense", "sparse": folder / "sparse"}


def test_a_config_is_no_dict(unchecked):
    with pytest.raises(ValueError, match=r"config=\{'steps': 0\} must be a FitConfig"):
        run(config={"steps": 0})


REFUSED = {
    "other vocabulary": (lambda _: {"dense": shallow(vocab=19)}, "19 and 17 tokens"),
    "other tokenizer": (two_tokenizers, "different tokenizers"),
    "seq_len over the context": (lambda _: {"seq_len": 13}, "seq_len=13 is over the models' context of 12"),
    "rows over the context": (
        lambda _: {"data": tokens(4, 14)},
        "data has rows of 14 tokens, over the models' context of 12",
    ),
    "foreign tokens beside sampled ones": (
        lambda _: {"data": None, "eval_data": DATA + 1},
        "eval_data holds token 17; the models know 0 to 16",
    ),
    "unknown setting": (lambda _: {"learning_rate": 1}, "learning_rate=1 is no setting of fit"),
    "impossible setting": (lambda _: {"steps": -1}, "steps=-1"),
    "foreign tokens": (lambda _: {"data": DATA + 1}, "data holds token 17; the models know 0 to 16"),
    "one row": (lambda _: {"data": DATA[:1]}, "data has 1 row"),
    "no rows": (lambda _: {"data": []}, "data holds no rows"),
    "unknown site": (lambda _: {"sites": ("7.attn",)}, "sites='7.attn'"),
    "k over the width": (lambda _: {"k": 13}, "k=13 is over the sparse model's width 12"),
    "training another family": (lambda _: {"sparse": shallow(), "train_sparse": True}, "needs a SparseTransformer"),
    "density of a frozen model": (lambda _: {"target_density": 0.5}, "target_density=0.5 needs train_sparse=True"),
    "interchange without a closed form": (
        lambda _: {"interchange_weight": 0.5, "closed_form": False},
        "interchange_weight=0.5 is solved in the closed form; it needs closed_form=True",
    ),
    "interchange without reconstruction": (
        lambda _: {"interchange_weight": 0.5, "nmse_weight": 0.0},
        "interchange_weight=0.5 is .* nmse_weight over 0",
    ),
    "interchange with a model that trains": (
        lambda _: {"interchange_weight": 0.5, "train_sparse": True},
        "interchange_weight=0.5 needs a frozen sparse model",
    ),
    "resume from nowhere": (lambda _: {"resume": True, "output_dir": None}, "resume=True needs output_dir"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_computed_or_written(what, tmp_path, monkeypatch):
    build, message = REFUSED[what]
    monkeypatch.setattr(fit_module._Run, "finish", _raise(AssertionError("a run began")))
    settings = {"output_dir": tmp_path / "run"} | build(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(**settings)
    assert not (tmp_path / "run").exists()


def test_a_used_folder_is_refused(tmp_path):
    run(steps=1, output_dir=tmp_path)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="already holds a run"):
        run(steps=1, output_dir=tmp_path)
    assert files(tmp_path) == before


def test_a_resume_with_other_settings_data_or_models_is_refused(tmp_path):
    run(steps=1, output_dir=tmp_path)
    before = files(tmp_path), rows(tmp_path)
    for settings, message in (
        ({"lr": 5e-2}, "lr=0.05, but the run was started with lr=0.01"),
        ({"data": DATA.flip(0)}, "other data"),
        ({"eval_data": DATA[:3]}, "other data"),
        ({"sparse": shallow(sparse_model, seed=99)}, "another sparse model"),
        ({"dense": shallow(seed=99)}, "another dense model"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**{"steps": 1, "output_dir": tmp_path, "resume": True, **settings})
    assert (files(tmp_path), rows(tmp_path)) == before


# Runs that end early.


@pytest.mark.parametrize("joint", [False, True])
def test_a_loss_that_is_not_finite_stops_the_run_at_the_last_good_checkpoint(tmp_path, monkeypatch, joint):
    settings = {"checkpoint_every": 1, **(SPARSE if joint else {})}
    run(**settings, output_dir=tmp_path / "whole")
    step = Trainer.train_step

    def poisoned(self, batches):
        if self.step == 2:
            with torch.no_grad():
                self.pair.bridge_set["0.mlp"].decoder_bias[0] = float("nan")
        return step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    with pytest.raises(FloatingPointError, match=r"step 3: nmse_decode at site 0\.mlp is nan; the last good"):
        run(**settings, output_dir=tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    assert sorted(f.name for f in (tmp_path / "run/checkpoints").iterdir())[-1] == "step-00000002"
    monkeypatch.undo()
    run(**settings, output_dir=tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_a_learning_rate_that_blows_up_is_noticed():
    pair = {"dense": shallow(dtype=torch.float32), "sparse": shallow(sparse_model, dtype=torch.float32)}
    with pytest.raises(FloatingPointError, match=r"step 2: nmse_encode at site 0\.attn is inf"):
        run(**pair, lr=1e30)


def interrupt(monkeypatch, at_evaluation, signals):
    """The process sends itself signals during its n-th held-out evaluation."""
    seen, measure = [], fit_module.measure

    def measured(*args, **kwargs):
        seen.append(1)
        if len(seen) == at_evaluation:
            for number in signals:
                os.kill(os.getpid(), number)
        return measure(*args, **kwargs)

    monkeypatch.setattr(fit_module, "measure", measured)


@pytest.mark.parametrize(("number", "joint"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_run_ended_by_ctrl_c_continues_to_the_same_bytes(tmp_path, monkeypatch, number, joint):
    settings = {"eval_every": 1, "steps": 5, **(SPARSE if joint else {})}
    run(**settings, output_dir=tmp_path / "whole")
    interrupt(monkeypatch, 3, [number])
    with pytest.raises(KeyboardInterrupt):
        run(**settings, output_dir=tmp_path / "run")
    monkeypatch.undo()
    assert (tmp_path / "run/checkpoints/step-00000003").is_dir() and len(rows(tmp_path / "run")) == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    found = run(**settings, output_dir=tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert [row["step"] for row in found.history] == [1, 2, 3, 4, 5]


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path, monkeypatch):
    settings = {"eval_every": 1, "steps": 5, "output_dir": tmp_path}
    interrupt(monkeypatch, 3, [signal.SIGINT, signal.SIGINT])
    with pytest.raises(KeyboardInterrupt):
        run(**settings)
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-00000000"]


def test_a_run_without_a_folder_can_be_interrupted_too(monkeypatch):
    interrupt(monkeypatch, 2, [signal.SIGINT])
    with pytest.raises(KeyboardInterrupt):
        run(eval_every=1)


def test_a_finished_run_resumed_is_its_result_and_no_step_more(tmp_path, monkeypatch):
    trained = shallow(sparse_model)
    first = run(sparse=trained, **SPARSE, output_dir=tmp_path)
    before = files(tmp_path), rows(tmp_path)
    monkeypatch.setattr(Trainer, "train_step", _raise(AssertionError("a step was made")))
    sparse = shallow(sparse_model)
    again = run(sparse=sparse, **SPARSE, output_dir=tmp_path, resume=True)
    assert same(again, first) and again.history == first.history and again.report == first.report
    assert (files(tmp_path), rows(tmp_path)) == before
    assert all(torch.equal(p, q) for p, q in zip(sparse.parameters(), trained.parameters(), strict=True))


def test_a_resume_of_nothing_starts(tmp_path):
    assert same(run(output_dir=tmp_path / "new", resume=True), run())


def test_a_run_killed_before_its_figures_were_written_only_measures_again(tmp_path, monkeypatch):
    run(output_dir=tmp_path / "whole")
    monkeypatch.setattr(fit_module._Run, "_measure", _raise(SystemExit))
    with pytest.raises(SystemExit):
        run(output_dir=tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr(Trainer, "train_step", _raise(AssertionError("a step was made")))
    run(output_dir=tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


# Runs in processes of their own.


def separately(*arguments, **variables):
    """Start `separate_runs.py`; its standard error is raised if it fails."""
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here}{os.pathsep}{here.parent}", **variables}
    command = [sys.executable, str(here / "separate_runs.py"), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finished(*processes):
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


@pytest.mark.slow
@pytest.mark.parametrize("joint", [False, True])
def test_a_run_killed_five_times_ends_with_the_bytes_of_one_never_killed(tmp_path, joint):
    """And repeats no step that a checkpoint holds. The frozen pair has the interchange loss, chosen at the start."""
    steps, every = 250, 10
    settings = {
        "steps": steps,
        "checkpoint_every": every,
        "batch_size": 2,
        "eval_every": 100,
        "closed_form_tokens": 200,
    }
    settings |= SPARSE if joint else {"interchange_weight": 0.5}
    finished(
        separately("killed", tmp_path / "killed", json.dumps(settings), 7 + joint),
        separately("fit", tmp_path / "whole", json.dumps(settings)),
    )
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "killed")] == list(range(1, steps + 1))

    attempts = (tmp_path / "killed/executed").read_text().split("killed\n")
    assert len(attempts) == 6
    done = 0
    for executed in (list(map(int, attempt.split())) for attempt in attempts):
        if executed:
            assert executed == list(range(executed[0], executed[-1] + 1))
            assert executed[0] % every == 1 and done - executed[0] < every
            done = executed[-1]
    assert done == steps


@pytest.mark.slow
@pytest.mark.parametrize("joint", [False, True])
def test_two_processes_are_one_with_the_doubled_batch(tmp_path, joint):
    settings = {"steps": 5, "gradient_accumulation_steps": 2, "closed_form_tokens": 200, "lr": 1e-2, "eval_every": 2}
    settings |= SPARSE if joint else {"interchange_weight": 0.5, "interchange_pairs": 16}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    two = json.dumps({**settings, "batch_size": 2})
    finished(
        separately("fit", tmp_path / "one", json.dumps({**settings, "batch_size": 4})),
        *(separately("fit", tmp_path / "two", two, RANK=r, LOCAL_RANK=r, **shared) for r in ("0", "1")),
    )
    one, two = (BridgeSet.from_pretrained(tmp_path / name) for name in ("one", "two"))
    for name, tensor in one.tensors().items():
        assert relative(two.tensors()[name], tensor) < 1e-8, name
    for name, value in one.report.flat().items():
        assert two.report.flat()[name] == pytest.approx(value, rel=1e-8), name
    assert [row["train/loss"] for row in two.history] == pytest.approx([r["train/loss"] for r in one.history], rel=1e-8)
    assert len(rows(tmp_path / "two")) == 5 and one.report.tokens == two.report.tokens
    if joint:
        trained = (SparseTransformer.from_pretrained(tmp_path / name / "sparse") for name in ("one", "two"))
        for p, q in zip(*(model.parameters() for model in trained), strict=True):
            assert relative(p.detach(), q.detach()) < 1e-8 or (p - q).abs().max() < 1e-12


def test_it_leaves_the_users_random_state_and_accelerator():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # another test may have left it
    models = {"dense": shallow(), "sparse": shallow(sparse_model)}
    before = torch.get_rng_state()
    run(**models)
    assert torch.equal(torch.get_rng_state(), before)
    assert not AcceleratorState._shared_state
    assert Accelerator(mixed_precision="bf16", cpu=True).mixed_precision == "bf16"
    AcceleratorState._reset_state()


def test_a_model_that_is_not_finite_is_named_before_anything_is_saved(tmp_path):
    sparse = shallow(sparse_model)
    with torch.no_grad():
        sparse.transformer.h[0].mlp.c_proj.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"closed form.*site final is not finite"):
        run(sparse=sparse, steps=0, output_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "bridges.safetensors").exists()


def test_a_resume_with_another_number_of_processes_is_refused(tmp_path):
    run(output_dir=tmp_path / "run", steps=1)
    for state in (tmp_path / "run" / "checkpoints").glob("step-*/state.json"):
        stored = json.loads(state.read_text())
        stored["settings"]["processes"] = 2
        state.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"processes=1, but the run was started with processes=2"):
        run(output_dir=tmp_path / "run", steps=1, resume=True)


def test_zeros_of_the_start_stay_where_a_whole_tensor_is_zero():
    """Biases of a fresh model: their support is empty."""
    sparse = shallow(sparse_model)
    with torch.no_grad():
        sparse.transformer.h[0].mlp.c_fc.bias.zero_()
    before = sparse.transformer.h[0].mlp.c_fc.weight.clone()
    run(sparse=sparse, train_sparse=True)
    assert not sparse.transformer.h[0].mlp.c_fc.bias.any()
    assert not torch.equal(sparse.transformer.h[0].mlp.c_fc.weight, before)


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_gradients_switched_off_around_it_change_nothing(switch):
    dense, sparse, expected = shallow(), shallow(sparse_model), run()
    with switch():
        assert same(run(dense=dense, sparse=sparse), expected)


def test_what_is_no_model_is_named(unchecked):
    with pytest.raises(ValueError, match="model=None is neither a model object nor a path"):
        fit(None, shallow(sparse_model), DATA)
