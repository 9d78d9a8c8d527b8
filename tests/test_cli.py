"""The command line as a user meets it: real processes are slow to start, so `main` is called with their arguments."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import tomli_w
import torch
from accelerate import PartialState
from gguf_files import tiny_llama, write_gguf
from pairs import gpt2, sparse_model

import bridges
from bridges import cli
from bridges.demo import sources
from bridges.fitting import run_file


def run(monkeypatch, capsys, *arguments):
    """(exit status, stdout, stderr) of `bridges ARGUMENTS`."""
    capsys.readouterr()  # saving a fixture's models shows progress bars
    monkeypatch.setattr(sys, "argv", ["bridges", *map(str, arguments)])
    try:
        cli.main()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def config(tmp_path):
    """Two saved models and a run file that names them."""
    gpt2(dtype=torch.float32).save_pretrained(tmp_path / "dense")
    sparse_model(dtype=torch.float32).save_pretrained(tmp_path / "sparse")
    path = tmp_path / "run.toml"
    path.write_text(
        f'[dense]\npath = "{tmp_path}/dense"\n[sparse]\npath = "{tmp_path}/sparse"\n'
        "[fit]\nsteps = 2\nseq_len = 8\nsampled_rows = 16\nbatch_size = 2\neval_tokens = 64\nprogress = false\n"
    )
    return path


def test_help_everywhere(monkeypatch, capsys):
    for arguments in ((), ("fit",), ("evaluate",), ("demo",), ("steer",), ("pretrain",), ("circuit",), ("report",)):
        status, out, _ = run(monkeypatch, capsys, *arguments, "--help")
        assert status == 0
        assert "Usage" in out


def test_fit_reads_the_file_and_takes_overrides(monkeypatch, capsys, config, tmp_path):
    out = tmp_path / "run"
    arguments = ("--fit.steps", "1", f"--fit.output_dir={out}", "--fit.seed", 3, "--dense.dtype", "float32")
    status, printed, err = run(monkeypatch, capsys, "fit", config, *arguments)
    assert status == 0, err
    assert "kl_sparse_to_dense" in printed
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1
    settings = json.loads((out / "config.json").read_text())["fit"]
    assert (settings["steps"], settings["seed"], settings["seq_len"]) == (1, 3, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--fit.stepz", "1"), "stepz=1 is not a setting of fit"),
        (("--fit.steps", "-1"), "steps=-1 is invalid"),
        (("--nonsense", "1"), "'--nonsense' is not an option"),
        (("--fit.steps",), "--fit.steps needs a value"),
        (("--data.pth", "x"), "pth='x' is unknown"),
        (("--dense.foo", "1"), "[dense] foo=1 is unknown; known are path, dtype, device_map, revision"),
        (("--sparse.dtype", "bfloatX"), "[sparse] dtype='bfloatX' must be float32, bfloat16"),
        (("--sparse.path", "missing/folder/here"), "missing/folder/here"),
        (("--fit.seq_len", "64"), "seq_len=64 is over the models' context of 12"),
    ],
)
def test_a_users_error_is_one_line_and_status_2(monkeypatch, capsys, config, arguments, message):
    status, _, err = run(monkeypatch, capsys, "fit", config, *arguments)
    assert status == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_another_mixed_precision_by_a_launcher_is_refused_before_a_model_is_read(monkeypatch, capsys, config):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    status, _, err = run(monkeypatch, capsys, "fit", config, "--dense.path", "missing/folder/here")
    assert status == 2 and len(err.strip().splitlines()) == 1
    assert 'set mixed_precision="bf16" in the settings of fit' in err
    arguments = ("--dense.path", "missing/folder/here", "--fit.mixed_precision", "bf16")
    status, _, err = run(monkeypatch, capsys, "fit", config, *arguments)
    assert status == 2 and "missing/folder/here" in err


def test_a_process_that_is_not_the_main_one_prints_and_writes_nothing(monkeypatch, capsys, config, tmp_path):
    monkeypatch.setattr(PartialState, "is_main_process", property(lambda self: False))
    arguments = ("--fit.steps", "0", f"--fit.output_dir={tmp_path / 'run'}")
    assert run(monkeypatch, capsys, "fit", config, *arguments) == (0, "", "")
    assert not (tmp_path / "run").exists()


def test_run_files_that_are_not_are_refused(monkeypatch, capsys, tmp_path):
    for text, message in (("[fit", "not valid TOML"), ("[fut]\nx = 1", "unknown table [fut]"), ("", "[dense] path")):
        (tmp_path / "run.toml").write_text(text)
        status, _, err = run(monkeypatch, capsys, "fit", tmp_path / "run.toml")
        assert status == 2
        assert message in err
    status, _, err = run(monkeypatch, capsys, "fit", tmp_path / "none.toml")
    assert (status, "must be a TOML file" in err) == (2, True)


def test_a_run_file_names_a_gguf_file_by_its_path_or_in_a_folder(tmp_path):
    write_gguf(tiny_llama(), tmp_path / "a.gguf")
    write_gguf(tiny_llama(), tmp_path / "b.gguf")
    for table in ({"path": f"{tmp_path}/b.gguf"}, {"path": str(tmp_path), "gguf_file": "b.gguf"}):
        run = run_file.RunFile({"dense": table})
        assert run.model("dense") == run.model_path("dense") == str(tmp_path / "b.gguf")
        assert run.tokenizer().get_vocab()["ab"] == 4
        half = run.with_values([("dense", "dtype", "bfloat16")]).model("dense")
        assert half.dtype == torch.bfloat16 and half.config.name_or_path == str(tmp_path / "b.gguf")
    on_the_hub = run_file.RunFile({"dense": {"path": "me/model", "gguf_file": "b.gguf"}})
    assert on_the_hub.model_path("dense") == "me/model"
    with pytest.raises(ValueError, match=r"\[dense\] gguf_file=3 must be text"):
        run_file.RunFile({"dense": {"path": "x", "gguf_file": 3}}).model_path("dense")


def test_evaluate_finds_the_models_and_the_heldout_rows_of_a_run(monkeypatch, capsys, config, tmp_path):
    out = tmp_path / "run"
    assert run(monkeypatch, capsys, "fit", config, "--fit.output_dir", out)[0] == 0
    status, printed, err = run(monkeypatch, capsys, "evaluate", out, "--out", tmp_path / "again.json")
    assert status == 0, err
    assert "nmse_decode" in printed
    first, again = (json.loads(path.read_text()) for path in (out / "report.json", tmp_path / "again.json"))
    assert first["tokens"] == again["tokens"]
    # Other batches, so the same up to rounding.
    for name in ("nmse_decode", "nmse_decode_shuffled", "kl_sparse_to_dense", "kl_dense_to_sparse_mean_ablation"):
        assert again["mean"][name] == pytest.approx(first["mean"][name], rel=1e-4)


def test_evaluate_loads_each_model_once(monkeypatch, capsys, config, tmp_path):
    out, loaded, load = tmp_path / "run", [], run_file.load_model
    dtypes = ("--dense.dtype", "float32", "--sparse.dtype", "float32")
    assert run(monkeypatch, capsys, "fit", config, "--fit.output_dir", out, *dtypes)[0] == 0

    def counted(source, *args, **kwargs):
        if isinstance(source, str):
            loaded.append(Path(source).name)
        return load(source, *args, **kwargs)

    monkeypatch.setattr(run_file, "load_model", counted)
    assert run(monkeypatch, capsys, "evaluate", out)[0] == 0
    assert loaded == ["dense", "sparse"]


def test_circuit_shows_a_node_in_both_models_of_a_run_and_in_one_without(monkeypatch, capsys, config, tmp_path):
    monkeypatch.setattr(cli, "feature", partial(bridges.feature, text_tokens=600))
    out, node = tmp_path / "run", ("--feature", "1.attn.read.3")
    assert run(monkeypatch, capsys, "fit", config, "--fit.output_dir", out)[0] == 0
    status, printed, err = run(monkeypatch, capsys, "circuit", out, *node)
    assert status == 0, err
    assert printed.startswith("1.attn.read.3: active at") and "dense model at 1.attn, by channel 3" in printed
    status, alone, _ = run(monkeypatch, capsys, "circuit", tmp_path / "sparse", *node)
    assert status == 0 and alone.splitlines()[0] == printed.splitlines()[0] and "dense" not in alone
    for folder in (tmp_path / "sparse", out):
        status, _, err = run(monkeypatch, capsys, "circuit", folder, *node, "--task", "for_while")
        assert status == 2 and "needs tokenizer" in err and len(err.strip().splitlines()) == 1


def test_evaluate_says_what_it_lacks(monkeypatch, capsys, config, tmp_path):
    status, _, err = run(monkeypatch, capsys, "evaluate", tmp_path)
    assert (status, "no config.json" in err) == (2, True)
    out = tmp_path / "run"
    assert run(monkeypatch, capsys, "fit", config, "--fit.output_dir", out)[0] == 0
    (out / run_file.NAME).unlink()
    status, _, err = run(monkeypatch, capsys, "evaluate", out)
    assert (status, "pass --dense and --sparse and --data" in err) == (2, True)
    models = ("--dense", tmp_path / "dense", "--sparse", tmp_path / "sparse")
    status, _, err = run(monkeypatch, capsys, "evaluate", out, *models)
    assert (status, "pass --data" in err) == (2, True)
    status, _, err = run(monkeypatch, capsys, "evaluate", out, "--dense", tmp_path / "sparse", *models[2:])
    assert status == 2


@pytest.mark.slow
def test_evaluate_reads_text_with_the_runs_tokenizer_or_another(monkeypatch, capsys, bundled_run, tmp_path):
    (tmp_path / "text.py").write_text(Path(__file__).read_text()[:2000])
    text = ("--data", tmp_path / "text.py", "--seq-len", "64", "--out", tmp_path / "report.json")
    status, printed, err = run(monkeypatch, capsys, "evaluate", bundled_run, *text)
    assert status == 0, err
    assert "nmse_decode" in printed and json.loads((tmp_path / "report.json").read_text())["tokens"] > 64
    status, _, err = run(monkeypatch, capsys, "evaluate", bundled_run, *text, "--tokenizer", tmp_path)
    assert status == 2 and "holds no tokenizer" in err


@pytest.fixture(scope="module")
def bundled_run(tmp_path_factory):
    """A run folder of the bundled pair, as the demo leaves one."""
    pair = bridges.load_pair()
    folder = tmp_path_factory.mktemp("run")
    bridges.load_bridges().save_pretrained(folder)
    (folder / "run.toml").write_text(tomli_w.dumps(sources(pair)))
    return folder


@pytest.mark.slow
def test_steer_edits_given_channels_and_writes_what_it_found(monkeypatch, capsys, bundled_run, tmp_path, quick_sweeps):
    arguments = ("--task", "for_while", "--site", "0.mlp", "--channel", "3,4", "--strengths", "0,2", "--n", 6)
    status, out, err = run(monkeypatch, capsys, "steer", bundled_run, *arguments, "--at", "read", "--out", tmp_path)
    assert status == 0, err
    assert "channels [3, 4] at 0.mlp (read)" in out and "random directions" in out
    content = json.loads((tmp_path / "for_while.json").read_text())
    assert content["strengths"] == [0.0, 2.0] and content["prompts"] == 6 and content["channel"] == [3, 4]
    assert (tmp_path / "for_while.png").stat().st_size > 10_000


@pytest.mark.slow
def test_circuit_compares_a_node_with_the_dense_models_mean_difference(monkeypatch, capsys, bundled_run):
    monkeypatch.setattr(cli, "feature", partial(bridges.feature, text_tokens=512))
    arguments = ("--feature", "1.attn.read.118", "--task", "for_while")
    status, printed, err = run(monkeypatch, capsys, "circuit", bundled_run, *arguments)
    assert status == 0, err
    assert "the dense model's mean difference of for_while: " in printed and "logits raised: " in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "swap"), "task='swap' is unknown"),
        (("--site", "0.mlp"), "--site and --channel go together"),
        (("--channel", "3"), "--site and --channel go together"),
        (("--tokenizer", "nowhere"), "tokenizer='nowhere' holds no tokenizer"),
        (("--site", "9.mlp", "--channel", "1", "--n", "2"), "site='9.mlp' has no bridge"),
        (("--site", "0.mlp", "--channel", "x"), "--channel 'x' must be channel numbers"),
        (("--strengths", "0,a"), "--strengths '0,a' must be numbers"),
        (("--at", "here", "--site", "0.mlp", "--channel", "1"), "--at 'here' must be one of read, residual"),
        (("--most", "9", "--n", "2"), "most=9 must be a whole number between 1 and 8"),
        (("--by", "sparse", "--n", "2"), "by='sparse' must be one of dense, both"),
        (("--budget", "-1", "--n", "2"), "budget=-1.0 must be 0 nats or more"),
    ],
)
def test_steer_refuses_in_one_line(monkeypatch, capsys, bundled_run, arguments, message):
    status, _, err = run(monkeypatch, capsys, "steer", bundled_run, *arguments)
    assert status == 2
    assert message in err and len(err.strip().splitlines()) == 1


def test_steer_hands_on_how_to_search(monkeypatch, capsys, bundled_run):
    def asked(_dense, _sparse, _bridges, task, channels, strengths, **settings):
        raise ValueError(
            f"{task}, {channels} channels, by {settings['by']}, {strengths}, n={settings['n']}, {settings['budget']}"
        )

    monkeypatch.setattr(cli, "sweep", asked)
    arguments = (
        "--task",
        "for_while",
        "--most",
        "3",
        "--by",
        "both",
        "--strengths",
        "0,1",
        "--n",
        "7",
        "--budget",
        "0.2",
    )
    status, _, err = run(monkeypatch, capsys, "steer", bundled_run, *arguments)
    assert (status, "for_while, 3 channels, by both, (0.0, 1.0), n=7, 0.2" in err) == (2, True)


def test_help_keeps_the_names_of_tables(monkeypatch, capsys):
    status, printed, _ = run(monkeypatch, capsys, "fit", "--help")
    words = " ".join(printed.replace("│", "").split())
    assert status == 0 and "TOML with the tables [dense], [sparse], [data]" in words
