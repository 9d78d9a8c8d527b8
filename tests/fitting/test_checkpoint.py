import json

import pytest
import torch
from safetensors.torch import load_file

from bridges.fitting.checkpoint import (
    Checkpoint,
    last_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)


def checkpoint(step):
    tensors = {"bridges": {"a": torch.arange(6.0).view(2, 3) * step}, "supports": {"w": torch.tensor([True, False])}}
    return Checkpoint(step, {"settings": {"lr": 0.1}, "data": "abc"}, tensors)


def test_a_checkpoint_saved_and_loaded_is_the_same(tmp_path):
    folder = save_checkpoint(tmp_path, checkpoint(7))
    assert folder == tmp_path / "step-00000007"
    assert sorted(file.name for file in folder.iterdir()) == [
        "bridges.safetensors",
        "state.json",
        "supports.safetensors",
    ]
    found = last_checkpoint(tmp_path)
    assert (found.step, found.state) == (7, {"settings": {"lr": 0.1}, "data": "abc"})
    for file, tensors in checkpoint(7).tensors.items():
        assert found.tensors[file].keys() == tensors.keys()
        assert all(torch.equal(found.tensors[file][name], tensor) for name, tensor in tensors.items())


def test_the_files_are_plain_safetensors_and_json(tmp_path):
    folder = save_checkpoint(tmp_path, checkpoint(1))
    assert torch.equal(load_file(folder / "bridges.safetensors")["a"], torch.arange(6.0).view(2, 3))
    assert json.loads((folder / "state.json").read_text())["step"] == 1


def test_the_last_two_are_kept_and_the_newest_is_read(tmp_path):
    for step in (0, 9, 10, 100):
        save_checkpoint(tmp_path, checkpoint(step))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]
    assert last_checkpoint(tmp_path).step == 100


def test_a_step_saved_again_replaces_the_first(tmp_path):
    save_checkpoint(tmp_path, checkpoint(3))
    save_checkpoint(tmp_path, checkpoint(3)._replace(state={"settings": {}, "data": "new"}))
    assert last_checkpoint(tmp_path).state["data"] == "new"


def test_a_folder_without_checkpoints_gives_none(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    assert last_checkpoint(tmp_path) is None


def test_a_partial_checkpoint_is_ignored_and_deleted(tmp_path):
    save_checkpoint(tmp_path, checkpoint(4))
    torn = tmp_path / ".step-00000005.123.tmp"
    torn.mkdir()
    (torn / "bridges.safetensors").write_bytes(b"half")
    (tmp_path / "step-00000006").mkdir()  # a folder without its last file is no checkpoint
    assert last_checkpoint(tmp_path).step == 4
    assert not torn.exists()


def test_a_save_that_fails_leaves_the_checkpoint_before_it(tmp_path):
    save_checkpoint(tmp_path, checkpoint(4))
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, checkpoint(5)._replace(state={"data": object()}))
    assert [f.name for f in tmp_path.iterdir()] == ["step-00000004"]
    assert last_checkpoint(tmp_path).step == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_optimizer_restored_goes_on_as_if_never_stopped(tmp_path, dtype):
    def start():
        parameters = [torch.nn.Parameter(torch.linspace(-1, 1, 4, dtype=dtype)), torch.nn.Parameter(torch.ones(2))]
        return parameters, torch.optim.AdamW(parameters, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)

    def steps(parameters, optimizer, n):
        for _ in range(n):
            for parameter in parameters:
                parameter.grad = (parameter.detach() - 2).pow(3)
            optimizer.step()

    whole, optimizer = start()
    steps(whole, optimizer, 6)
    first, optimizer = start()
    steps(first, optimizer, 3)
    save_checkpoint(tmp_path, Checkpoint(3, {}, {"optimizer": optimizer_tensors(optimizer)}))
    second, optimizer = start()
    with torch.no_grad():
        for parameter, reached in zip(second, first, strict=True):
            parameter.copy_(reached)
    restore_optimizer(optimizer, last_checkpoint(tmp_path).tensors["optimizer"])
    steps(second, optimizer, 3)
    assert all(torch.equal(one, two) for one, two in zip(second, whole, strict=True))


def test_an_optimizer_that_made_no_step_has_no_tensors():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    assert optimizer_tensors(optimizer) == {}
    restore_optimizer(optimizer, {})
    assert optimizer.state_dict()["state"] == {}
