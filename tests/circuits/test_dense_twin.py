"""The control in a model of the same class with dense weights, on planted models whose truth is known."""

import json

import pytest
import torch
from pairs import gpt2, sparse_model
from planted import planted_model, planted_pairs, planted_text

import bridges
from bridges.circuits.circuit import Circuit, Edge
from bridges.circuits.controls import controls
from bridges.circuits.dense_twin import load_dense_twin, text_ce, twin_verdict
from bridges.circuits.pruning import prune
from bridges.sparsity.projection import density

FRESH = planted_pairs(64, seed=3)


@torch.no_grad()
def rotated(model):
    """The same function in another basis of the stream: RMSNorm has gain 1 and no AbsTopK drops anything, so that a
    rotation of everything that is written and read changes no logit. Every weight of the path is spread over all."""
    other = planted_model()
    q, _ = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    for one, given in zip(other.parameters(), model.parameters(), strict=True):
        one.copy_(given)
    block = other.blocks[0]
    for reads in (other.lm_head, block.attn.c_attn, block.mlp.c_fc):
        reads.weight.copy_(reads.weight @ q.T)
    for writes in (block.attn.c_proj, block.mlp.c_proj):
        writes.weight.copy_(q @ writes.weight)
    other.transformer.wte.weight.copy_(other.transformer.wte.weight @ q.T)
    return other


@pytest.fixture(scope="module")
def found_with():
    """The controls of the planted circuit beside a given twin."""
    model = planted_model()
    circuit = prune(model, planted_pairs(), text=planted_text(), steps=60, target_loss=0.01, progress=False)

    def measure(twin):
        options = {"text": planted_text(), "searches": False, "progress": False}
        return controls(model, circuit, FRESH, dense_twin=twin, **options)

    return measure


def test_in_another_basis_the_same_function_has_a_larger_circuit(found_with):
    twin = rotated(planted_model())
    with torch.no_grad():
        logits = [one(FRESH.input_ids).logits for one in (twin, planted_model())]
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)
    found = found_with(twin)
    assert found["attribution"] == {"nodes": 4, "edges": 2, "loss": pytest.approx(found["attribution"]["loss"])}
    of_twin = found["dense_twin"]
    assert of_twin["text_ce"] == pytest.approx(of_twin["text_ce_own"], rel=1e-9)
    assert of_twin["density"] == density(twin) > 2 * density(planted_model())
    for method in ("masks", "attribution"):
        assert of_twin[method]["nodes"] >= 6 and of_twin[method]["edges"] >= 4 and of_twin[method]["loss"] <= 0.01
    assert not any(line.startswith("dense twin") for line in found["verdict"])


def test_a_twin_with_as_small_a_circuit_is_said_to_have_one(found_with):
    found = found_with(planted_model(seed=1))
    assert {found["dense_twin"][method]["nodes"] for method in ("masks", "attribution")} == {4}
    lines = [line for line in found["verdict"] if line.startswith("dense twin")]
    assert len(lines) == 2 and "by masks a circuit of 4 nodes and 2 edges" in lines[0]
    assert all("as few nodes and edges as here (4 nodes and 2 edges)" in line for line in lines)


def test_a_twin_that_does_not_do_the_task_has_its_best_loss(found_with):
    useless = planted_model()
    with torch.no_grad():
        useless.lm_head.weight[:, :4] = 0
    found = found_with(useless)
    assert all(found["dense_twin"][method]["nodes"] is None for method in ("masks", "attribution"))
    assert all(found["dense_twin"][method]["loss"] > 0.15 for method in ("masks", "attribution"))
    assert not any(line.startswith("dense twin") for line in found["verdict"])


def test_the_verdict_names_what_is_as_small():
    edges = [Edge("0.attn.read.0", f"0.attn.v.{i}", 1.0) for i in range(8)]
    circuit = Circuit("mine", {"0.attn.v": tuple(range(8))}, edges, {})

    def lines(nodes, n_edges):
        size = {"nodes": nodes, "edges": n_edges, "loss": 0.1}
        return twin_verdict(circuit, {"dense_twin": {"masks": size, "attribution": {"nodes": None}}})

    assert lines(11, 11) == [] and lines(None, None) == [] and twin_verdict(circuit, {}) == []
    assert "as few nodes as here" in lines(10, 11)[0]
    assert "as few edges as here" in lines(11, 10)[0]
    assert "as few nodes and edges as here (8 nodes and 8 edges)" in lines(10, 10)[0]


def test_the_loss_on_text_by_hand():
    model, rows = planted_model(), planted_text(3)
    with torch.no_grad():
        log_p = model(rows).logits.log_softmax(-1)
    expected = -torch.stack([log_p[r, t, rows[r, t + 1]] for r in range(3) for t in range(9)]).mean()
    assert text_ce(model, [(rows[:2], None), (rows[2:], None)]) == pytest.approx(expected.item(), rel=1e-9)


def test_a_twin_that_is_none_is_refused_in_one_line():
    model = planted_model()
    with pytest.raises(ValueError, match="dense_twin=GPT2LMHeadModel must be a SparseTransformer") as error:
        load_dense_twin(gpt2(), model, None)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="dense_twin is the model that the circuit was pruned from"):
        load_dense_twin(model, model, None)
    with pytest.raises(ValueError, match=r"other tokens than the model \(17 and 12 of them\)"):
        load_dense_twin(sparse_model(), model, None)


def test_a_twin_with_another_tokenizer_is_refused(tmp_path):
    sparse, tokenizer = bridges.load_pair()[1:]
    sparse.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_dense_twin(tmp_path, sparse, tokenizer) is not sparse
    file = tmp_path / "tokenizer.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"]
    vocabulary["while"], vocabulary["for"] = vocabulary["for"], vocabulary["while"]
    file.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match="dense_twin has other tokens"):
        load_dense_twin(tmp_path, sparse, tokenizer)
