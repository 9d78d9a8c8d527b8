"""Exports are read back by other means and steer the same model to the same logits."""

import pytest
import torch
from gguf import GGUFReader
from pairs import gpt2, join, sparse_model, tokens, with_units
from safetensors.torch import load_file

from bridges.steering.edits import Edit
from bridges.steering.export import directions, export_direction
from bridges.steering.steer import steer

EDITS = [Edit("2.attn", 3, 0.6, "add"), Edit("2.attn", 1, -0.4, "add"), Edit("final", 2, 0.8, "add")]


@pytest.fixture(scope="module")
def pair():
    return with_units(join(gpt2(layers=3, dtype=torch.float32), sparse_model(layers=3, dtype=torch.float32)))


def steered(pair, edits):
    with torch.no_grad(), steer(pair.dense.model, pair.bridge_set, edits, at="residual", strength=1.5):
        return pair.dense.model(tokens()).logits


def test_safetensors_hold_a_vector_per_dense_site(pair, tmp_path):
    edits = [*EDITS, Edit("0.mlp", 5, 0.2, "add")]
    export_direction(pair.dense.model, pair.bridge_set, edits, tmp_path / "d.safetensors", strength=1.5)
    vectors = load_file(tmp_path / "d.safetensors")
    assert set(vectors) == {"0.mlp", "2.attn", "final"}
    places = {pair.dense.index(site): vector for site, vector in vectors.items()}
    with torch.no_grad(), pair.dense.hook_residuals({i: lambda h, v=v: h + v for i, v in places.items()}):
        logits = pair.dense.model(tokens()).logits
    assert torch.allclose(logits, steered(pair, edits), atol=1e-6)


def test_a_control_vector_is_added_to_the_output_of_its_layers(pair, tmp_path):
    """As llama.cpp applies it: direction.N to the output of layer N, which counts from 0."""
    export_direction(pair.dense.model, pair.bridge_set, EDITS, tmp_path / "d.gguf", strength=1.5)
    reader = GGUFReader(tmp_path / "d.gguf")
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "gpt2"
    assert reader.get_field("controlvector.layer_count").contents() == 3
    vectors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert set(vectors) == {"direction.1", "direction.2"}
    handles = []
    for name, vector in vectors.items():
        layer = pair.dense.model.transformer.h[int(name.removeprefix("direction."))]
        handles.append(layer.register_forward_hook(lambda module, args, output, v=vector: output + v))
    with torch.no_grad():
        logits = pair.dense.model(tokens()).logits
    for handle in handles:
        handle.remove()
    assert torch.allclose(logits, steered(pair, EDITS), atol=1e-6)
    assert not torch.allclose(logits, pair.dense.model(tokens()).logits, atol=1e-2)


def test_directions_are_the_decoders_columns_in_stream_units(pair):
    bridge = pair.bridge_set["2.attn"]
    found = directions(pair.bridge_set, EDITS[0], strength=2.0)
    expected = 2 * 0.6 * bridge.decoder_weight[:, 3] * bridge.rms_sparse / bridge.gain_sparse[3]
    assert list(found) == ["2.attn"] and torch.allclose(found["2.attn"], expected.float())


REFUSED = {
    "set": (Edit("2.attn", 3, 0.6), "d.gguf", "mode='set' at channel=3: only an edit that adds one number"),
    "positions": (Edit("2.attn", 3, 0.6, "add", 0), "d.gguf", "only an edit that adds one number at every position"),
    "first layer": (Edit("1.attn", 3, 0.6, "add"), "d.gguf", r"site='1\.attn' is not the output of a layer"),
    "inside a layer": (Edit("2.mlp", 3, 0.6, "add"), "d.gguf", r"site='2\.mlp' is not the output of a layer"),
    "kind": (EDITS[0], "d.bin", r"must end in \.safetensors or \.gguf"),
}


@pytest.mark.parametrize(("edit", "name", "message"), REFUSED.values(), ids=REFUSED)
def test_edits_and_paths_that_cannot_be_exported_are_refused(pair, tmp_path, edit, name, message):
    with pytest.raises(ValueError, match=message):
        export_direction(pair.dense.model, pair.bridge_set, edit, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("edit", "strength", "message"),
    [
        (Edit("9.attn", 1, 1.0, "add"), 1.0, "site='9.attn' has no bridge"),
        (Edit("1.attn", 99, 1.0, "add"), 1.0, "channel=99 must lie between 0 and 11, the sparse stream's channels"),
        (Edit("1.attn", 1, 1.0, "add"), float("nan"), "strength=nan must be a finite number"),
        (Edit("1.attn", 5, 1.0, "add"), 1.0, "channel=5 at site='1.attn' cannot be edited: its norm gain is 0"),
    ],
)
def test_what_steer_refuses_is_not_exported(tmp_path, edit, strength, message):
    pair = with_units(join(gpt2(), sparse_model()))
    pair.bridge_set["1.attn"].gain_sparse[5] = 0
    with pytest.raises(ValueError, match=message):
        export_direction(pair.dense.model, pair.bridge_set, edit, tmp_path / "d.safetensors", strength=strength)
    assert not (tmp_path / "d.safetensors").exists()
