import json
from importlib import import_module

import pytest
import torch
from fits import DATA, files, raiser, rows, run, shallow
from pairs import gpt2, sparse_model, tokens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from bridges.fit import fit
from bridges.models.loading import as_residual

fit_module = import_module("bridges.fit")


def word_tokenizer(words):
    table = {word: i for i, word in enumerate(["<unk>", *words])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(table, "<unk>")), unk_token="<unk>")


def two_tokenizers(folder):
    for name, model, words in (("dense", gpt2(), "a b"), ("sparse", sparse_model(), "a c")):
        model.save_pretrained(folder / name)
        word_tokenizer(words.split()).save_pretrained(folder / name)
    return {"dense": folder / "dense", "sparse": folder / "sparse"}


def test_a_dict_as_config_is_refused(unchecked):
    with pytest.raises(ValueError, match=r"config=\{'steps': 0\} must be a FitConfig"):
        run(config={"steps": 0})


REFUSED = {
    "other vocabulary": (lambda _: {"dense": shallow(vocab=19)}, "19 and 17 tokens, and no tokenizer"),
    "other tokenizer": (two_tokenizers, "different tokenizers"),
    "seq_len over the context": (lambda _: {"seq_len": 13}, "seq_len=13 is over the models' context of 12"),
    "rows over the context": (
        lambda _: {"data": tokens(4, 14)},
        "data has rows of 14 tokens, over the models' context of 12",
    ),
    "unknown tokens held out where rows are sampled": (
        lambda _: {"data": None, "eval_data": DATA + 1},
        "eval_data holds token 17; valid ids are 0 to 16",
    ),
    "unknown setting": (lambda _: {"learning_rate": 1}, "learning_rate=1 is not a setting of fit"),
    "impossible setting": (lambda _: {"steps": -1}, "steps=-1"),
    "unknown tokens": (lambda _: {"data": DATA + 1}, "data holds token 17; valid ids are 0 to 16"),
    "one row": (lambda _: {"data": DATA[:1]}, "data has 1 row"),
    "no rows": (lambda _: {"data": []}, "data holds no rows"),
    "unknown site": (lambda _: {"sites": ("7.attn",)}, "sites='7.attn'"),
    "k over the width": (lambda _: {"k": 13}, "k=13 is over the sparse model's width 12"),
    "training a model that is not sparse": (
        lambda _: {"sparse": shallow(), "train_sparse": True},
        "needs a SparseTransformer",
    ),
    "training another family's ResidualModel": (
        lambda _: {"sparse": as_residual(shallow()), "train_sparse": True},
        "sparse=GPT2LMHeadModel: train_sparse=True needs a SparseTransformer",
    ),
    "density of a frozen model": (lambda _: {"target_density": 0.5}, "target_density=0.5 needs train_sparse=True"),
    "the setting of a loss that has left": (
        lambda _: {"interchange_weight": 0.5},
        "interchange_weight=0.5 is not a setting of fit; the settings are steps, ",
    ),
    "resume from nowhere": (lambda _: {"resume": True, "output_dir": None}, "resume=True needs output_dir"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_mistake_is_refused_before_anything_is_computed_or_written(what, tmp_path, monkeypatch):
    build, message = REFUSED[what]
    for name in ("solve_bridges", "measure", "announce"):
        monkeypatch.setattr(fit_module, name, raiser(AssertionError("the run began")))
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
        ({"lr": 5e-2}, "lr=0.05, but the run was started with lr=0.001"),
        ({"data": DATA.flip(0)}, "other data"),
        ({"eval_data": DATA[:3]}, "other data"),
        ({"sparse": shallow(sparse_model, seed=99)}, "another sparse model"),
        ({"dense": shallow(seed=99)}, "another dense model"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**{"steps": 1, "output_dir": tmp_path, "resume": True, **settings})
    assert (files(tmp_path), rows(tmp_path)) == before


def test_a_resume_with_other_rows_in_a_step_is_refused_whatever_splits_them(tmp_path):
    run(output_dir=tmp_path / "run", steps=1)
    for state in (tmp_path / "run" / "checkpoints").glob("step-*/state.json"):
        stored = json.loads(state.read_text())
        stored["settings"]["processes"] = 2
        state.write_text(json.dumps(stored))
    message = r"processes=1, batch_size=4.*4 rows a step, but the run was started with 8 .*pass batch_size=8, or use"
    with pytest.raises(ValueError, match=message):
        run(output_dir=tmp_path / "run", steps=1, resume=True)
    run(output_dir=tmp_path / "run", steps=1, batch_size=8, resume=True)


def test_a_model_that_is_not_finite_is_named_before_anything_is_saved(tmp_path):
    sparse = shallow(sparse_model)
    with torch.no_grad():
        sparse.transformer.h[0].mlp.c_proj.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"closed form.*site final is not finite"):
        run(sparse=sparse, steps=0, output_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "bridges.safetensors").exists()


def test_a_learning_rate_that_makes_a_loss_infinite_stops_the_run():
    pair = {"dense": shallow(dtype=torch.float32), "sparse": shallow(sparse_model, dtype=torch.float32)}
    with pytest.raises(FloatingPointError, match=r"step 2: nmse_encode at site 0\.attn is inf"):
        run(**pair, lr=1e30)


def test_a_value_that_is_not_a_model_is_named(unchecked):
    with pytest.raises(ValueError, match="model=None"):
        fit(None, shallow(sparse_model), DATA)
