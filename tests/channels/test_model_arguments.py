"""Models as objects, `ResidualModel`s or folders: the same result, and the tokenizer is found with the dense model."""

import math

import pytest
import torch
from pairs import gpt2, join, sparse_model, with_units

import bridges

VOCAB, CONTEXT = 1024, 64


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Tiny random models over the bundled tokenizer's vocabulary, in folders, with random bridges."""
    folder = tmp_path_factory.mktemp("models")
    dense = gpt2(vocab=VOCAB, context=CONTEXT, dtype=torch.float32)
    sparse = sparse_model(dtype=torch.float32, vocab_size=VOCAB, block_size=CONTEXT)
    dense.save_pretrained(folder / "dense")
    sparse.save_pretrained(folder / "sparse")
    bridges.load_pair().tokenizer.save_pretrained(folder / "dense")
    return folder, with_units(join(dense, sparse)).bridge_set


def as_given(folder, kind):
    dense, sparse = folder / "dense", folder / "sparse"
    if kind == "str":
        return str(dense), str(sparse)
    if kind == "ResidualModel":
        return bridges.as_residual(dense), bridges.as_residual(sparse)
    return dense, sparse


@pytest.mark.parametrize("kind", ["str", "Path", "ResidualModel"])
def test_every_function_takes_models_by_name_and_finds_the_tokenizer(saved, kind):
    folder, bridge_set = saved
    text = torch.arange(64).view(4, 16)
    given = (*as_given(folder, kind), bridge_set, "for_while")
    objects = (*(bridges.as_residual(model).model for model in as_given(folder, "Path")), bridge_set, "for_while")
    options = {"candidates": 8, "budget": math.inf, "text": text}
    found = bridges.find_channels(*given, 4, **options)
    assert found == bridges.find_channels(*objects, 4, tokenizer=bridges.load_pair().tokenizer, **options)
    assert found.best.site in bridge_set.sites
    edits = bridges.constant_edits(*given[:3], found.best, "for_while", n=4)
    assert [edit.channel for edit in edits] == list(found.best.channels)


def test_sweep_takes_folders(saved):
    folder, bridge_set = saved
    chosen = bridges.Channels("0.mlp", (3,), "residual")
    dense, sparse = as_given(folder, "str")
    result = bridges.sweep(dense, sparse, bridge_set, "for_while", chosen, (1.0,), n=2, text=torch.ones(1, 4).long())
    assert result.prompts == 2 and result.effects.kl_other_tasks is not None


def test_a_folder_without_a_tokenizer_asks_for_one(saved):
    folder, bridge_set = saved
    with pytest.raises(ValueError, match="task='for_while' needs tokenizer=: no tokenizer is saved with the model"):
        bridges.find_channels(folder / "sparse", folder / "sparse", bridge_set, "for_while", check_models=False)
