import json

import numpy as np
import pytest
import torch

from bridges.steering.edits import Edit, load_edits, save_edits

EDITS = [
    Edit("1.attn", 3, 0.5),
    Edit("0.mlp", 7, -2, "scale", [0, -1]),
    Edit("final", 1, torch.tensor([[0.0, 0.25], [-1.5, 3.0]]), "add"),
]


def test_edits_come_back_from_json(tmp_path):
    save_edits(EDITS, tmp_path / "edits.json")
    again = load_edits(tmp_path / "edits.json")
    assert [e.to_dict() for e in again] == [e.to_dict() for e in EDITS]
    assert torch.equal(again[2].value, EDITS[2].value) and again[1].positions == (0, -1)
    save_edits(again, tmp_path / "again.json")
    assert (tmp_path / "edits.json").read_bytes() == (tmp_path / "again.json").read_bytes()


def test_one_position_is_a_tuple_of_one():
    assert Edit("0.attn", 1, 1.0, positions=-1).positions == (-1,)


REFUSED = {
    "mode": (dict(mode="multiply"), "mode='multiply' must be one of set, add, scale"),
    "negative channel": (dict(channel=-1), "channel=-1 must be an index"),
    "channel": (dict(channel=1.0), "channel=1.0 must be an index"),
    "not a number": (dict(value="1"), "value='1' must be a finite number or a tensor"),
    "not finite": (dict(value=float("inf")), "value=inf must be a finite number"),
    "flat": (dict(value=torch.ones(3), mode="add"), r"value=\(3,\) of torch.float32 must be finite numbers"),
    "integers": (dict(value=torch.ones(3, 2, dtype=torch.long), mode="add"), "of torch.int64 must be finite numbers"),
    "nan": (dict(value=torch.full((1, 2), float("nan")), mode="add"), "must be finite numbers"),
    "per token, set": (dict(value=torch.ones(1, 2)), "mode='set' takes one number"),
    "per token, positions": (dict(value=torch.ones(1, 2), mode="add", positions=1), "cannot go with a value per token"),
    "positions": (dict(positions=[0.5]), r"positions=\[0.5\] must be integers or None"),
    "true among positions": (dict(positions=[True, 2]), r"positions=\[True, 2\] must be integers or None"),
    "a table of positions": (dict(positions=[[1, 2]]), r"positions=\[\[1, 2\]\] must be integers or None"),
    "true or false": (dict(value=True), "value=True must be a finite number"),
    "site": (dict(site=3), "site=3 must be the name of a sparse site"),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_fields_are_refused(given, message, unchecked):
    with pytest.raises(ValueError, match=message):
        Edit(**({"site": "0.attn", "channel": 1, "value": 1.0} | given))


DAMAGED = {
    "a list": ("[]", "must be JSON with a list of objects"),
    "no list": ('{"edits": 3}', "must be JSON with a list of objects"),
    "cut": ('{"edits": [', "is not valid JSON"),
    "a key too many": (
        json.dumps({"edits": [EDITS[0].to_dict() | {"strength": 2}]}),
        "'strength' is unknown or missing",
    ),
    "text in a table": (
        json.dumps({"edits": [EDITS[2].to_dict() | {"value": [[1, "a"], [2, 3]]}]}),
        r"edits\.json: value=\[\[1, 'a'\], \[2, 3\]\]... must be one number, or rows of numbers",
    ),
    "a key too few": (json.dumps({"edits": [{"site": "0.attn"}]}), "'channel' is unknown or missing"),
}


@pytest.mark.parametrize(("text", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named(tmp_path, text, message):
    (tmp_path / "edits.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_edits(tmp_path / "edits.json")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensors_numbers_come_back_to_the_last_bit(tmp_path, dtype):
    value = torch.randn(2, 3, dtype=dtype, generator=torch.Generator().manual_seed(0))
    save_edits(Edit("0.attn", 3, value, "add"), tmp_path / "e.json")
    (edit,) = load_edits(tmp_path / "e.json")
    assert edit.value.dtype == dtype and torch.equal(edit.value, value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"edits": [1]}', "must be JSON with a list of objects under .edits."),
        (
            '{"edits": [{"site": "0.attn", "channel": 1, "value": [[1, 2], [3]], "mode": "add", "positions": null}]}',
            "rows of numbers of one length",
        ),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, content, message):
    (tmp_path / "e.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_edits(tmp_path / "e.json")


@pytest.mark.parametrize("one", [np.int64(3), np.array(3), torch.tensor(3), [np.int32(3)], torch.tensor([3]), {3}])
def test_other_libraries_numbers_are_numbers(one, unchecked):
    edit = Edit("0.attn", np.int64(2), np.float32(0.5), positions=one)
    assert edit.positions == (3,) and type(edit.positions[0]) is int
    assert type(edit.value) is float and json.dumps(edit.to_dict())


def test_numpys_integers_are_channels_and_fractions_are_no_positions(unchecked):
    assert Edit("0.attn", np.int64(3), 1.0).to_dict()["channel"] == 3
    with pytest.raises(ValueError, match=r"positions=1\.5 must be integers or None"):
        Edit("0.attn", 3, 1.0, positions=1.5)
