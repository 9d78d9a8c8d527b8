import pytest
import torch
from pairs import gpt2, join, sparse_model, toy_task, with_units

from bridges.channels.prompts import frozen_pair
from bridges.circuits.circuit import Circuit, Edge
from bridges.circuits.features import token_names
from bridges.tasks.pairs import TaskPairs
from bridges.views.tasks import task_view


@pytest.fixture(scope="module")
def pair():
    joined = with_units(join(gpt2(), sparse_model()))
    with frozen_pair(joined.dense.model, joined.sparse.model, joined.bridge_set, check_models=False) as models:
        yield models


def test_examples_show_both_prompts_without_padding_and_where_they_differ(pair):
    pairs = toy_task()
    mask = pairs.attention_mask.clone()
    mask[0, :2] = 0  # the cue of every prompt stands at 2
    padded = pairs.replaced(attention_mask=mask)
    shown = task_view(pair, padded, token_names(None, 17), None, "not found", None, "not measured")["examples"]
    assert len(shown) == 3
    ids, other = pairs.input_ids[0, 2:].tolist(), pairs.counterfactual_ids[0, 2:].tolist()
    assert shown[0]["prompt"] == [f"[{i}]" for i in ids] and shown[0]["counterfactual"] == [f"[{i}]" for i in other]
    assert shown[0]["cue"] == [0] and shown[1]["cue"] == [2]
    assert shown[0]["answers"] == ["[3]"] and shown[0]["targets"] == ["[4]", "[6]"]


def test_solved_is_the_share_whose_answer_is_likelier_than_the_target(pair):
    pairs = toy_task()
    found = task_view(pair, pairs, token_names(None, 17), None, "", None, "")["solved"]
    for side, model in (("dense", pair.dense), ("sparse", pair.sparse)):
        with torch.no_grad():
            logits = model.residuals(pairs.input_ids)[1][:, -1].softmax(-1)
        right = 0
        for row, answers, targets in zip(logits, pairs.answers.tolist(), pairs.targets.tolist(), strict=True):
            p, q = (sum(row[i] for i in tokens if i >= 0) for tokens in (answers, targets))
            right += bool(p > q)
        assert found[side] == pytest.approx(right / len(pairs))


def test_what_is_missing_is_said_and_what_is_there_is_shown(pair):
    circuit = Circuit("toy", {"0.attn.read": (1, 2)}, [Edge("0.attn.read.1", "0.attn.q.0", 1.0)], {}, loss=0.1)
    pairs, names = toy_task(), token_names(None, 17)
    bare = task_view(pair, pairs, names, None, "not found", None, "not measured")
    assert (bare["circuit"], bare["circuit_missing"]) == (None, "not found")
    assert (bare["steering"], bare["steering_missing"]) == ({"one": None, "few": None}, "not measured")
    full = task_view(pair, pairs, names, circuit, "not found", {"one": {"task": "toy"}, "few": None}, "not measured")
    assert full["circuit"] == {"nodes": 2, "edges": 1, "loss": 0.1} and full["circuit_missing"] == ""
    assert full["steering"]["one"] == {"task": "toy"} and full["steering_missing"] == ""
    assert isinstance(pairs, TaskPairs) and full["description"] == ""
