"""Circuits of models with hand-written weights, whose truth is known."""

import json

import pytest
import torch
from pairs import sparse_model
from planted import PATH, SECOND_PATH, planted_model, planted_pairs, planted_text

import bridges
from bridges.circuits.circuit import Circuit, edges_between
from bridges.circuits.necessity import NECESSARY_LOSS, necessity
from bridges.circuits.nodes import Node
from bridges.circuits.paths import on_paths
from bridges.circuits.pruning import prune

SETTINGS = {"steps": 60, "progress": False}


def names(circuit):
    return {f"{place}.{index}" for place, indices in circuit.nodes.items() for index in indices}


@pytest.fixture(scope="module")
def model():
    return planted_model()


@pytest.fixture(scope="module")
def circuit(model):
    return prune(model, planted_pairs(), text=planted_text(), **SETTINGS)


def test_pruning_finds_exactly_the_nodes_and_edges_that_do_the_task(circuit):
    assert names(circuit) == set(PATH)
    assert {(edge.source, edge.target, edge.weight) for edge in circuit.edges} == {
        ("0.attn.read.0", "0.attn.v.0", 1.0),
        ("0.attn.v.0", "0.attn.write.1", 1.0),
    }
    assert (circuit.n_nodes, circuit.n_edges) == (4, 2)
    assert circuit.loss <= 0.15 and circuit.loss_full_model <= 0.15


def test_of_two_paths_that_do_the_same_one_is_found(model):
    found = names(prune(planted_model(redundant=True), planted_pairs(), text=planted_text(), **SETTINGS))
    assert found in (set(PATH), set(SECOND_PATH))


def test_the_nodes_that_do_the_task_in_the_first_ones_place_are_found_in_a_second_round():
    model, pairs = planted_model(redundant=True), planted_pairs()
    found = prune(model, pairs, text=planted_text(), rounds=4, **SETTINGS)
    assert names(found) == {*PATH, *SECOND_PATH} and found.settings["round_sizes"] == [4, 4]
    assert found.loss <= 0.15 and found.evaluate(model, pairs.rows(48)).loss == pytest.approx(found.loss, rel=1e-12)
    assert necessity(model, found, pairs)["loss"] > NECESSARY_LOSS
    assert found.n_edges == 4


def test_where_the_model_cannot_do_without_the_first_circuit_no_other_is_looked_for(model, circuit):
    found = prune(model, planted_pairs(), text=planted_text(), rounds=4, **SETTINGS)
    assert found.nodes == circuit.nodes and found.settings["round_sizes"] == [4]


def test_the_model_is_left_as_it_was(circuit):
    model = planted_model().train()
    before, trains = [p.clone() for p in model.parameters()], [p.requires_grad for p in model.parameters()]
    prune(model, planted_pairs(16), text=planted_text(), steps=2, progress=False)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == trains
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not any(module._forward_hooks for module in model.modules())


def test_every_seed_searches_and_the_smallest_circuit_is_returned(model):
    found = prune(model, planted_pairs(), text=planted_text(), seeds=2, **SETTINGS)
    assert len(found.settings["sizes"]) == 2 and min(found.settings["sizes"]) == found.n_nodes
    again = prune(model, planted_pairs(), text=planted_text(), seeds=2, **SETTINGS)
    assert again.nodes == found.nodes and again.loss == found.loss


def test_a_target_that_no_circuit_reaches_is_an_error_that_names_the_best_loss(model):
    with pytest.raises(
        ValueError, match=r"task 'planted' does not come under target_loss=0\.15: the best loss is 0\.\d+"
    ):
        prune(model, planted_pairs(shuffled=True), text=planted_text(), steps=3, progress=False)


def test_the_figures_of_a_saved_circuit_computed_again_are_equal(model, circuit, tmp_path):
    circuit.save(tmp_path)
    loaded = Circuit.load(tmp_path)
    assert loaded.nodes == circuit.nodes and loaded.edges == circuit.edges
    assert loaded.settings["steps"] == 60 and loaded.versions["sparse-bridges"]
    judged = planted_pairs().rows(48)
    assert circuit.evaluate(model, judged).loss == pytest.approx(circuit.loss, rel=1e-12)
    assert loaded.evaluate(model, judged) == circuit.evaluate(model, judged)
    first = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    loaded.save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == first
    assert json.loads(first["circuit.json"])["nodes"]["0.attn.v"] == [0]


def test_without_the_circuit_the_task_is_guessed_and_with_it_alone_it_is_done(model, circuit):
    pairs = planted_pairs(32, seed=5)
    assert circuit.evaluate(model, pairs).accuracy == 1
    with torch.no_grad():
        with circuit.ablate(model):
            rest = model(pairs.input_ids).logits[:, -1, [4, 5]]
        whole = model(pairs.input_ids).logits[:, -1, [4, 5]]
    # What is left is a constant: the circuit's nodes at their means.
    assert (rest[:, 0] - rest[:, 1]).std() < 0.01 < 0.5 < (whole[:, 0] - whole[:, 1]).abs().min()


def test_a_circuit_is_refused_by_another_model(circuit):
    with pytest.raises(ValueError, match="the circuit belongs to another model"), circuit.apply(planted_model(seed=1)):
        pass


def test_a_damaged_folder_is_named(circuit, tmp_path):
    circuit.save(tmp_path)
    values = json.loads((tmp_path / "circuit.json").read_text())
    del values["scale"]
    (tmp_path / "circuit.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="has no scale"):
        Circuit.load(tmp_path)
    with pytest.raises(OSError):
        Circuit.load(tmp_path / "missing")


def test_edges_are_all_nonzero_weights_between_nodes_that_are_on(model):
    everything = {place: torch.ones_like(mask) for place, mask in on_paths(model, [0], [0]).items()}
    block = model.blocks[0]
    matrices = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
    edges = edges_between(model, everything)
    assert len(edges) == sum(int((m.weight != 0).sum()) for m in matrices)
    for edge in edges:
        Node.parse(edge.source, model), Node.parse(edge.target, model)
    assert edges_between(model, {place: torch.zeros_like(mask) for place, mask in everything.items()}) == []


def test_what_does_not_fit_is_refused_in_one_line():
    from pairs import gpt2

    cases = [
        ((gpt2(), planted_pairs()), {}, "sparse=GPT2LMHeadModel must be a SparseTransformer"),
        ((planted_model(), planted_pairs(3)), {}, "has 3 pairs; pruning needs at least 4"),
        ((planted_model(), planted_pairs()), {"target_loss": 0}, "target_loss=0 is invalid"),
        ((planted_model(), planted_pairs()), {"ridge": 1}, "ridge=1 is not a setting of prune"),
        ((sparse_model(), "no_such_task"), {"tokenizer": bridges.load_pair().tokenizer}, "no_such_task"),
    ]
    for arguments, settings, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            prune(*arguments, progress=False, **settings)
        assert "\n" not in str(error.value)


def test_without_pairs_set_aside_the_size_is_chosen_on_those_that_train():
    """The last quarter of the pairs has the wrong answers: alone they refuse what all pairs together accept."""
    pairs = planted_pairs(32)
    last = (torch.arange(32) >= 24)[:, None]
    wrong = pairs.replaced(
        answers=torch.where(last, pairs.targets, pairs.answers), targets=torch.where(last, pairs.answers, pairs.targets)
    )
    settings = {"text": planted_text(), "steps": 40, "target_loss": 0.6, "progress": False}
    circuit = prune(planted_model(), wrong, judge_share=0, **settings)
    assert circuit.n_nodes == 4 and 0.5 < circuit.loss < 0.6  # of a right answer in three of four, 0.562 at best
    with pytest.raises(ValueError, match=r"does not come under target_loss=0\.6"):
        prune(planted_model(), wrong, **settings)
