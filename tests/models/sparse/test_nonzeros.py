import json
import struct

import pytest
import torch

from bridges.models.sparse.model import SparseConfig, SparseTransformer
from bridges.models.sparse.nonzeros import read_nonzeros, write_nonzeros

FILE = "sparse_model.safetensors"


def sparsify(tensor, density, seed=0):
    kept = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)) < density
    return torch.where(kept, tensor, 0)


def build(density, **options):
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "block_size": 32, "n_layer": 1, "d_model": 64}
    model = SparseTransformer(SparseConfig(**{**shape, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("sink_logit", "final_logits_bias")) and ".ln_" not in name:
                parameter.copy_(sparsify(torch.randn_like(parameter), density))
    return model


def header(path):
    with path.open("rb") as file:
        return json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))


def test_a_model_with_a_thousandth_of_its_weights_takes_a_hundredth_of_the_space(tmp_path):
    model = build(1 / 1000, n_layer=2, d_model=256)
    model.save_pretrained(tmp_path, sparse=True)
    dense = sum(4 * tensor.numel() for tensor in model.state_dict().values())
    assert (tmp_path / FILE).stat().st_size * 100 < dense
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "generation_config.json", FILE]
    again = SparseTransformer.from_pretrained(tmp_path).state_dict()
    assert list(again) == list(model.state_dict())
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"tied_unembed": True}, {"enable_bigram_table": True, "d_pos_emb": 8}])
def test_save_load_save_gives_the_same_bytes(tmp_path, options):
    build(0.02, **options).save_pretrained(tmp_path / "a", sparse=True)
    SparseTransformer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b", sparse=True)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert list(header(tmp_path / "a" / FILE)["__metadata__"]) == ["nonzeros"]


def tensors():
    torch.manual_seed(0)
    far = torch.zeros(70, 3000)
    far[69, 5] = 1.5  # a gap that 16 bits do not hold
    return {
        "all zero": torch.zeros(7, 9),
        "dense": torch.randn(5, 3),
        "empty": torch.zeros(0, 4),
        "far": far,
        "first and last": torch.tensor([[2.0, *[0.0] * 40], [*[0.0] * 40, -3.0]]),
        "near": sparsify(torch.randn(64, 64), 0.2),
        "not finite": torch.tensor([0.0] * 50 + [float("inf"), float("nan")]),
        "scalar": torch.tensor(2.0),
        "smallest": torch.tensor([0.0] * 30 + [1e-45]),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_tensors_are_read_back_bit_for_bit(tmp_path, dtype):
    given = {name: tensor.to(dtype) for name, tensor in tensors().items()}
    write_nonzeros(tmp_path / FILE, given)
    again = read_nonzeros(tmp_path / FILE)
    assert set(again) == set(given)
    for name, tensor in given.items():
        assert again[name].dtype == dtype and again[name].shape == tensor.shape
        assert (
            again[name].numpy(force=True).tobytes() == tensor.numpy(force=True).tobytes()
            if (dtype != torch.bfloat16)
            else torch.equal(again[name].view(torch.int16), tensor.view(torch.int16))
        ), name


def test_gaps_are_stored_in_the_smallest_integer_type(tmp_path):
    write_nonzeros(tmp_path / FILE, tensors())
    kinds = {name: entry["dtype"] for name, entry in header(tmp_path / FILE).items() if name.endswith(".gaps")}
    assert kinds["near.gaps"] == "U8" and kinds["far.gaps"] == "U32"
    assert "dense.gaps" not in kinds


def test_negative_zero_becomes_zero(tmp_path):
    write_nonzeros(tmp_path / FILE, {"w": torch.tensor([-0.0] * 20 + [1.0])})
    again = read_nonzeros(tmp_path / FILE)["w"]
    assert not again.signbit().any() and again[-1] == 1


def test_a_save_removes_weights_of_the_other_form(tmp_path):
    model = build(0.01)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model.save_pretrained(tmp_path, sparse=True)
    assert not list(tmp_path.glob("model*"))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.safetensors*")} == {"model.safetensors"}
    (tmp_path / FILE).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"has both sparse_model\.safetensors and model\.safetensors"):
        SparseTransformer.from_pretrained(tmp_path)


def test_a_save_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    model = build(0.01)
    model.save_pretrained(tmp_path, sparse=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_args, **_kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("bridges.io.files.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(tmp_path, sparse=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("kept", [0, 4, 0.5, 0.999])
def test_a_file_cut_short_is_refused(tmp_path, kept):
    build(0.01).save_pretrained(tmp_path, sparse=True)
    content = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content[: kept if kept >= 1 else int(kept * len(content))])
    with pytest.raises(ValueError, match=r"sparse_model\.safetensors is (empty|not a whole)") as caught:
        SparseTransformer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_parts_that_do_not_fit_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / FILE
    parts = {"w.gaps": torch.tensor([3, 9], dtype=torch.uint8), "w.values": torch.ones(2)}
    for stored, shapes, message in (
        (parts, {"w": [3, 4]}, "the nonzeros of w do not fit its shape"),
        ({**parts, "w.values": torch.ones(3)}, {"w": [9, 9]}, "the nonzeros of w do not fit its shape"),
        ({"w.gaps": parts["w.gaps"]}, {"w": [9, 9]}, "the tensor w is missing"),
    ):
        save_file(stored, path, metadata={"nonzeros": json.dumps(shapes)})
        with pytest.raises(ValueError, match=message):
            read_nonzeros(path)
    for metadata in (None, {"nonzeros": "{"}):
        save_file(parts, path, metadata=metadata)
        with pytest.raises(ValueError, match="is not a file of nonzeros"):
            read_nonzeros(path)


def test_a_sparse_folder_is_not_pushed_while_saving(tmp_path):
    with pytest.raises(ValueError, match="push_to_hub=True needs sparse=False"):
        build(0.01).save_pretrained(tmp_path, sparse=True, push_to_hub=True)
