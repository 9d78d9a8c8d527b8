import math

import pytest
import torch
from pairs import sparse_model, tokens
from planted import PATH, SECOND_PATH, VOCAB, planted_model, planted_pairs, planted_text

import bridges
from bridges.circuits.circuit import Circuit, edges_between
from bridges.circuits.nodes import node_means, place_sizes, recorded_nodes
from bridges.circuits.task_loss import Presented, answer_differences, task_loss
from bridges.views.circuit import circuit_view, head_pattern, place_label

NAMES = [f"[{i}]" for i in range(VOCAB)]


def circuit_of(model, nodes, **values):
    """A circuit of the given nodes, with means over the planted text."""
    on = {place: torch.zeros(size, dtype=torch.bool) for place, size in place_sizes(model).items()}
    for node in nodes:
        place, _, index = node.rpartition(".")
        on[place][int(index)] = True
    means = node_means(model, [(planted_text(), None)])
    indices = {place: tuple(mask.nonzero().flatten().tolist()) for place, mask in on.items()}
    return Circuit("planted", indices, edges_between(model, on), means, **{"scale": 2.0, "shift": 0.1, **values})


def test_a_planted_chain_is_shown_node_by_node_with_its_weights_and_the_stream_between():
    model = planted_model()
    view = circuit_view(model, circuit_of(model, PATH), planted_pairs(), NAMES)
    ids = [node["id"] for node in view["nodes"]]
    assert ids == list(PATH)
    assert [column["place"] for column in view["columns"]] == [node.rpartition(".")[0] for node in PATH]
    edges = {(ids[edge["source"]], ids[edge["target"]], edge["kind"]): edge["weight"] for edge in view["edges"]}
    assert edges == {
        ("0.attn.read.0", "0.attn.v.0", "weight"): 1.0,
        ("0.attn.v.0", "0.attn.write.1", "weight"): 1.0,
        ("0.attn.write.1", "final.read.1", "stream"): 1.0,
    }
    # The tokens that write to the first node, and those whose logits the last one moves.
    assert "'[1]' +2.00" in view["nodes"][0]["tokens"] and "'[2]' \N{MINUS SIGN}2.00" in view["nodes"][0]["tokens"]
    assert "'[4]' +3.00" in view["nodes"][-1]["tokens"] and view["nodes"][1]["tokens"] == ""


def test_figures_are_those_of_the_circuit_and_of_the_model_without_it():
    model, pairs = planted_model(), planted_pairs(seed=3)
    circuit = circuit_of(model, PATH)
    view = circuit_view(model, circuit, pairs, NAMES)
    fresh = circuit.evaluate(model, pairs)
    assert view["fresh"] == {"pairs": len(pairs), **fresh._asdict()}
    assert view["ablated"]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert view["verdict"] == view["controls"] == [] and view["scale"] == 2.0 and view["shift"] == 0.1


def test_ablating_a_node_of_a_chain_leaves_guessing_and_one_of_two_chains_does_not():
    single, redundant, pairs = planted_model(), planted_model(redundant=True), planted_pairs()
    alone = circuit_view(single, circuit_of(single, PATH), pairs, NAMES)
    both = circuit_view(redundant, circuit_of(redundant, (*PATH, *SECOND_PATH)), pairs, NAMES)
    prompts = Presented.of(pairs.rows(0, 24), "cpu")
    with torch.no_grad(), circuit_of(single, PATH).apply(single):
        whole = task_loss(answer_differences(single, prompts), prompts.sign, 2.0, 0.1).item()
    # With every node but the last at its mean, the answer no longer depends on the prompt.
    for node in alone["nodes"]:
        assert whole + node["ablation"] > 0.5
    assert all(node["ablation"] < alone["nodes"][0]["ablation"] for node in both["nodes"])
    assert [row["layer"] for row in alone["ablation_by_layer"]] == ["0.attn", "final"]
    assert alone["ablation_by_layer"][1]["loss"] == pytest.approx(alone["nodes"][-1]["ablation"])


def test_nodes_after_the_first_few_are_not_ablated(monkeypatch):
    monkeypatch.setattr("bridges.views.circuit.MAX_ABLATED", 2)
    model = planted_model()
    view = circuit_view(model, circuit_of(model, PATH), planted_pairs(8), NAMES)
    assert [node["ablation"] is None for node in view["nodes"]] == [False, False, True, True]


@pytest.mark.parametrize("sink", [True, False])
def test_a_pattern_is_what_the_head_mixes_values_by(sink):
    model, ids = sparse_model(layers=2, sink=sink).eval(), tokens(1, 7)
    with torch.no_grad():
        if sink:
            model.blocks[1].attn.attn_imp.sink_logit.normal_()
        attention = model.blocks[1].attn
        mixed = []
        handle = attention.c_proj.register_forward_hook(lambda module, args, output: mixed.append(args[0]))
        with recorded_nodes(model, ["1.attn.v"]) as values:
            model(ids)
        handle.remove()
        v = attention.split_heads(values["1.attn.v"])[0]
        for head in range(attention.n_head):
            pattern = head_pattern(model, 1, head, ids[0])
            own = mixed[0][0, :, head * attention.d_head : (head + 1) * attention.d_head]
            torch.testing.assert_close(pattern @ v[head], own)
            assert (pattern.triu(1) == 0).all()
            total = pattern.sum(-1)
            assert (total < 1).all() if sink else torch.allclose(total, torch.ones_like(total))


def test_patterns_are_of_the_heads_that_the_circuit_has_nodes_of():
    model = planted_model()
    view = circuit_view(model, circuit_of(model, PATH), planted_pairs(), NAMES)
    (one,) = view["attention"]
    assert (one["layer"], one["head"]) == (0, 0)
    assert [prompt["name"] for prompt in one["prompts"]] == [
        *("pair 1, prompt", "pair 1, counterfactual", "pair 2, prompt", "pair 2, counterfactual")
    ]
    assert all(len(prompt["pattern"]) == len(prompt["tokens"]) == 8 for prompt in one["prompts"])


def test_a_circuit_of_no_nodes_is_shown_too():
    model = planted_model()
    view = circuit_view(model, circuit_of(model, ()), planted_pairs(8), NAMES)
    assert view["nodes"] == view["edges"] == view["columns"] == view["attention"] == []


def test_every_place_has_a_label():
    assert len({place_label(place) for place in place_sizes(planted_model())}) == len(place_sizes(planted_model()))


def test_controls_are_told_in_words_and_held_against_the_circuit_as_its_verdict_does():
    model, pairs = planted_model(redundant=True), planted_pairs()
    circuit = bridges.prune(model, pairs, text=planted_text(), steps=30, progress=False)
    found = bridges.controls(model, circuit, pairs, text=planted_text(), progress=False)
    rows = circuit_view(model, Circuit(**{**vars(circuit), "controls": found}), pairs, NAMES)["controls"]
    by_name = {row["name"]: row for row in rows}
    assert by_name["these nodes forbidden"]["as_good"] == any("redundant" in line for line in found["verdict"])
    assert by_name["these nodes forbidden"]["as_good"] and "nodes" in by_name["these nodes forbidden"]["value"]
    assert not by_name["shuffled labels"]["as_good"]
    necessity = f"loss {found['necessity']['loss']:.3f}"
    assert necessity in by_name["necessity"]["value"]
    assert by_name["necessity"]["as_good"] == any("not necessary" in line for line in found["verdict"])
