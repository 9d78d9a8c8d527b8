"""Controls of planted circuits, whose truth is known."""

import math
from dataclasses import replace

import pytest
import torch
from planted import PATH, SECOND_PATH, planted_model, planted_pairs, planted_text

import bridges
from bridges.circuits.circuit import Circuit
from bridges.circuits.controls import (
    controls,
    elsewhere,
    interchange,
    meaningless_cue,
    necessity,
    outside_kept,
    permuted_weights,
    shuffled_labels,
)
from bridges.circuits.pruning import frozen_and_fast, prune
from bridges.sparsity.projection import sparse_parameters

SETTINGS = {"steps": 60, "progress": False}


def found_in(model, **settings):
    return prune(model, planted_pairs(), text=planted_text(), **SETTINGS, **settings)


@pytest.fixture(scope="module")
def unique():
    model = planted_model()
    return model, found_in(model)


@pytest.fixture(scope="module")
def redundant():
    model = planted_model(redundant=True)
    return model, found_in(model)


FRESH = planted_pairs(64, seed=3)


def test_a_circuit_that_is_all_there_is_has_no_control_that_does_as_well(unique):
    model, circuit = unique
    found = controls(model, circuit, FRESH, text=planted_text(), progress=False)
    assert found["heldout"]["accuracy"] == 1 and found["heldout"]["loss"] < 0.15
    assert found["necessity"]["loss"] > 0.9 * math.log(2)
    assert found["interchange"]["followed"] == pytest.approx(1, abs=0.02) and found["interchange"]["flipped"] == 1
    assert found["other_seed"]["nodes"] == 4
    for name in ("shuffled_labels", "meaningless_cue", "forbidden"):
        assert found[name]["nodes"] is None and found[name]["loss"] > 0.5, name
    assert found["verdict"] == ["no control does as well as the circuit"]
    stored = replace(circuit, controls=found)
    assert stored.controls["verdict"]


def test_a_redundant_circuit_is_said_to_be_so(redundant):
    model, circuit = redundant
    found = controls(model, circuit, FRESH, text=planted_text(), progress=False)
    assert found["necessity"]["accuracy"] == 1
    assert found["forbidden"]["nodes"] == 4
    assert found["interchange"]["followed"] == pytest.approx(0.5, abs=0.05)
    words = " ".join(found["verdict"])
    assert "not necessary" in words and "redundant: without these nodes another circuit of 4 nodes" in words


def test_necessity_is_the_loss_with_the_circuits_nodes_frozen_by_hand(redundant):
    model, circuit = redundant
    on = {place: set(indices) for place, indices in circuit.nodes.items()}
    block, means = model.blocks[0], circuit.means

    def freeze(place):
        def hook(module, args, output):
            output = output.clone()
            for i in on[place]:
                output[..., i] = means[place][i]
            return output

        return hook

    modules = {"0.attn.read": block.attn.attn_in, "0.attn.v": block.attn.attn_v, "0.attn.write": block.attn.attn_out}
    handles = [m.register_forward_hook(freeze(p)) for p, m in {**modules, "final.read": model.transformer.ln_f}.items()]
    with torch.no_grad():
        d = []
        for ids, right in ((FRESH.input_ids, FRESH.answers), (FRESH.counterfactual_ids, FRESH.targets)):
            logits = model(ids).logits[:, -1]
            d.append(logits.gather(1, right)[:, 0] - logits[:, [4, 5]].sum(1) + logits.gather(1, right)[:, 0])
    for handle in handles:
        handle.remove()
    d = torch.cat(d)
    assert necessity(model, circuit, FRESH)["loss_unscaled"] == pytest.approx(torch.log1p((-d).exp()).mean().item())


def test_outside_nodes_that_run_are_none_all_or_a_share(unique):
    model, circuit = unique
    rows = outside_kept(model, circuit, FRESH)
    assert [row["share"] for row in rows] == [0, 0.25, 0.5, 0.75, 0.9, 1]
    assert all(row["worst"] >= row["mean"] for row in rows)
    assert rows[0]["mean"] <= circuit.evaluate(model, FRESH).loss + 1e-9  # with a scale of its own
    assert rows == outside_kept(model, circuit, FRESH)


def test_what_the_circuit_does_elsewhere_is_told_for_text_and_other_tasks():
    pair = bridges.load_pair()
    text = torch.randint(1024, (4, 16), generator=torch.Generator().manual_seed(0))
    nothing = Circuit("for_while", {}, [], {p: torch.zeros(n) for p, n in sizes_of(pair.sparse).items()})
    found = elsewhere(pair.sparse, nothing, text)
    assert found == {"text_kl": pytest.approx(0, abs=1e-6), "tasks": {}}
    with torch.no_grad():
        much = replace(nothing, nodes={"final.read": tuple(range(512))})
        assert elsewhere(pair.sparse, much, text)["text_kl"] > 0.1


def test_what_ablating_a_planted_circuit_costs_on_text_is_the_kl_worked_out_by_hand(redundant):
    """One of two paths is frozen: text with the cue changes, and by as much as freezing its modules by hand says."""
    model, circuit = redundant
    text = planted_text(16, seed=4)
    block, means = model.blocks[0], circuit.means
    modules = {"0.attn.read": block.attn.attn_in, "0.attn.v": block.attn.attn_v, "0.attn.write": block.attn.attn_out}
    modules |= {"final.read": model.transformer.ln_f}

    def freeze(place):
        at = torch.tensor(circuit.nodes[place])
        return lambda module, args, output: output.index_copy(-1, at, means[place][at].expand(*output.shape[:-1], -1))

    assert {place for place, indices in circuit.nodes.items() if indices} <= modules.keys()
    with torch.no_grad():
        whole = model(text).logits.double().log_softmax(-1)
        handles = [modules[p].register_forward_hook(freeze(p)) for p, at in circuit.nodes.items() if at]
        frozen = model(text).logits.double().log_softmax(-1)
    for handle in handles:
        handle.remove()
    by_hand = (whole.exp() * (whole - frozen)).sum(-1).mean().item()
    assert elsewhere(model, circuit, text)["text_kl"] == pytest.approx(by_hand, rel=1e-4) and by_hand > 0.1


@pytest.mark.slow(20)
def test_without_any_stream_at_the_end_every_other_task_is_guessed():
    pair = bridges.load_pair()
    sizes = sizes_of(pair.sparse)
    everything = Circuit(
        "for_while", {"final.read": tuple(range(2048))}, [], {p: torch.zeros(n) for p, n in sizes.items()}
    )
    text = torch.randint(1024, (2, 8), generator=torch.Generator().manual_seed(0))
    found = elsewhere(pair.sparse, everything, text, pair.tokenizer)["tasks"]
    assert len(found) == 19 and "for_while" not in found
    assert all(one["ablated"] == 0.5 for one in found.values())
    assert found["single_double_quote"]["whole"] == 1 and found["var_swap"]["whole"] < 0.9


def sizes_of(model):
    from bridges.circuits.nodes import place_sizes

    return place_sizes(model)


def test_exchanging_all_nodes_is_the_counterfactual_run(unique):
    model, circuit = unique
    everything = {place: tuple(range(size)) for place, size in sizes_of(model).items()}
    found = interchange(model, replace(circuit, nodes=everything, fingerprint=""), FRESH)
    assert found == {"followed": pytest.approx(1, abs=1e-12), "flipped": 1.0}
    assert interchange(model, replace(circuit, nodes={}), FRESH) == {"followed": 0.0, "flipped": 0.0}


def test_shuffled_labels_exchange_whole_answers_of_about_half_of_the_pairs():
    shuffled = shuffled_labels(FRESH)
    exchanged = (shuffled.answers == FRESH.targets).all(1) & (shuffled.targets == FRESH.answers).all(1)
    kept = (shuffled.answers == FRESH.answers).all(1) & (shuffled.targets == FRESH.targets).all(1)
    assert (exchanged ^ kept).all() and 15 < exchanged.sum() < 49
    assert torch.equal(shuffled.input_ids, FRESH.input_ids)


def test_a_meaningless_cue_stands_where_the_cue_stood_and_is_another_token():
    other = meaningless_cue(FRESH)
    cue = FRESH.input_ids != FRESH.counterfactual_ids
    assert torch.equal(other.input_ids != other.counterfactual_ids, cue)
    assert torch.equal(other.input_ids[~cue], FRESH.input_ids[~cue])
    tokens = set(other.input_ids[cue].tolist())
    assert len(tokens) == 2 and not tokens & {1, 2}
    assert torch.equal(other.answers, FRESH.answers)


def test_permuted_weights_have_the_same_support_and_the_same_values():
    model = planted_model()
    other = permuted_weights(model)
    changed = False
    for (name, before), (_, after) in zip(sparse_parameters(model), sparse_parameters(other), strict=True):
        assert torch.equal(before != 0, after != 0), name
        assert torch.equal(before.flatten().sort().values, after.flatten().sort().values), name
        changed |= not torch.equal(before, after)
    assert changed


def test_weights_are_permuted_also_where_the_model_runs_by_its_nonzeros_alone():
    """A copy made there would keep the products with the nonzeros of the model."""
    model = planted_model().float()
    outside = permuted_weights(model)
    with torch.no_grad(), frozen_and_fast(model):
        inside = permuted_weights(model)
        with frozen_and_fast(inside):
            logits = inside(FRESH.input_ids).logits
        torch.testing.assert_close(logits, outside(FRESH.input_ids).logits, rtol=1e-4, atol=1e-5)
        assert (logits - model(FRESH.input_ids).logits).abs().max() > 0.1


def test_every_node_of_the_second_path_is_found_when_the_first_is_forbidden(redundant):
    _, circuit = redundant
    names = {f"{place}.{i}" for place, indices in circuit.nodes.items() for i in indices}
    assert names in (set(PATH), set(SECOND_PATH))
