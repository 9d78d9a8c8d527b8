"""Models named by an object, a ResidualModel, a folder (str or Path)."""

from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from pairs import tokens
from steered import CHANNEL, SITE, logits
from torch import nn

from bridges.models.huggingface.decompose import model_inputs
from bridges.steering.counterfactual import counterfactual
from bridges.steering.edits import Edit
from bridges.steering.export import export_direction
from bridges.steering.steer import steer


@pytest.fixture
def named(pair, tmp_path):
    """Every way of naming the pair's models."""
    for name in ("dense", "sparse"):
        getattr(pair, name).model.save_pretrained(tmp_path / name)
    folders = {"dense": tmp_path / "dense", "sparse": tmp_path / "sparse"}
    return [
        {"dense": pair.dense, "sparse": pair.sparse},
        folders,
        {name: str(folder) for name, folder in folders.items()},
    ]


@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_steer_takes_a_model_however_it_is_named_and_yields_it(pair, named, strength):
    pair.bridge_set.record_models(pair.dense.model, pair.sparse.model)
    edit = Edit(SITE, CHANNEL, 3.0)
    with steer(pair.dense.model, pair.bridge_set, edit, sparse=pair.sparse.model, strength=strength) as model:
        assert model is pair.dense.model
        expected = logits(pair, tokens())
    for names in named:
        with (
            steer(names["dense"], pair.bridge_set, edit, sparse=names["sparse"], strength=strength) as model,
            torch.no_grad(),
        ):
            assert isinstance(model, nn.Module)
            found = model(**model_inputs(model, tokens(), None)).logits
        assert torch.allclose(found, expected, atol=1e-12)


def test_counterfactual_takes_a_sparse_model_however_it_is_named(pair, named):
    ids = tokens()
    expected = counterfactual(pair.sparse.model, SITE, CHANNEL, ids, ids.flip(0)).value
    for names in named:
        assert torch.equal(counterfactual(names["sparse"], SITE, CHANNEL, ids, ids.flip(0)).value, expected)


def test_export_direction_takes_a_dense_model_however_it_is_named(pair, named, tmp_path):
    edit = Edit("final", CHANNEL, 3.0, "add")
    for names in named:
        export_direction(names["dense"], pair.bridge_set, edit, tmp_path / "direction.gguf")
        reader = GGUFReader(tmp_path / "direction.gguf")
        assert [tensor.name for tensor in reader.tensors] == ["direction.1"]


def test_a_folder_that_does_not_exist_is_named(pair):
    with pytest.raises(OSError, match="/no/such/folder"):
        steer(Path("/no/such/folder"), pair.bridge_set, Edit(SITE, CHANNEL, 3.0, "add")).__enter__()
