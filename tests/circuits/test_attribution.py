"""Attributions against finite differences, and what pruning by them finds in models whose truth is known."""

import pytest
import torch
from pairs import sparse_model, tokens
from planted import PATH, SECOND_PATH, planted_model, planted_pairs, planted_text

from bridges.circuits import search
from bridges.circuits.attribution import attributions
from bridges.circuits.masks import ablated
from bridges.circuits.nodes import node_means, replaced_nodes
from bridges.circuits.paths import on_paths
from bridges.circuits.pruning import prune
from bridges.circuits.settings import PruneConfig
from bridges.circuits.task_loss import Presented, answer_differences, calibrate, task_loss
from bridges.tasks.pairs import TaskPairs


def padded_prompts():
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[::2, :3] = 0
    answers, targets = torch.tensor([[1, 2], [3, -1], [4, -1], [1, 2]]), torch.tensor([[8], [9], [12], [5]])
    direction = torch.tensor([0, 1, 0, 1])
    return Presented.of(TaskPairs("mine", tokens(seed=1), tokens(seed=2), mask, answers, targets, direction), "cpu")


def names(circuit):
    return {f"{place}.{index}" for place, indices in circuit.nodes.items() for index in indices}


def test_an_attribution_is_the_slope_of_the_loss_as_one_node_goes_to_its_mean():
    model, prompts = sparse_model().eval(), padded_prompts()
    means = node_means(model, [(tokens(seed=3), None)])
    found = attributions(model, prompts, means)

    @torch.no_grad()
    def loss(place, index, share):
        def moved(x):
            x = x.clone()
            x[..., index] += share * (means[place][index] - x[..., index])
            return x

        with replaced_nodes(model, {place: moved}):
            return task_loss(answer_differences(model, prompts), prompts.sign).item()

    assert found.keys() == means.keys() and all(one.dtype == torch.float64 for one in found.values())
    largest = max(one.abs().max().item() for one in found.values())
    for place, of_place in found.items():
        for index in range(0, len(of_place), 3):
            slope = (loss(place, index, 1e-6) - loss(place, index, -1e-6)) / 2e-6
            assert of_place[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-8 * largest + 1e-9), (place, index)


def test_attributions_do_not_depend_on_the_pass_and_leave_the_model_alone():
    model, prompts = sparse_model().eval(), padded_prompts()
    means, passes = node_means(model, [(tokens(seed=3), None)]), []
    at_once = attributions(model, prompts, means)
    in_parts = attributions(model, prompts, means, 3, lambda: passes.append(1))
    assert len(passes) == 3
    for place in means:
        torch.testing.assert_close(in_parts[place], at_once[place], rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():  # as a notebook that has switched gradients off
        assert torch.equal(attributions(model, prompts, means)["final.read"], at_once["final.read"])


def test_pruning_by_attribution_finds_exactly_the_nodes_and_edges_that_do_the_task():
    circuit = prune(planted_model(), planted_pairs(), text=planted_text(), method="attribution", progress=False)
    assert names(circuit) == set(PATH) and circuit.n_edges == 2
    assert circuit.loss <= 0.15 and circuit.settings["method"] == "attribution"


def test_of_two_paths_that_do_the_same_one_is_left():
    model = planted_model(redundant=True)
    circuit = prune(model, planted_pairs(), text=planted_text(), method="attribution", progress=False)
    assert names(circuit) in (set(PATH), set(SECOND_PATH))


def test_before_nodes_are_dropped_it_is_the_shortest_head_of_the_ranking_that_reaches_the_target(monkeypatch):
    monkeypatch.setattr(search, "TRIALS", 0)
    model, pairs = planted_model(redundant=True), planted_pairs()
    circuit = prune(model, pairs, text=planted_text(), method="attribution", target_loss=0.1, progress=False)
    means = node_means(model, [(planted_text(), None)])
    train, judge = Presented.of(pairs.rows(0, 48), "cpu"), Presented.of(pairs.rows(48), "cpu")
    fitted_on = Presented.of(pairs.rows(0, search.CALIBRATION_PAIRS), "cpu")
    sizes = attributions(model, train, means)
    allowed = on_paths(model, range(12), [4, 5])
    order = sorted(
        ((place, i) for place, mask in allowed.items() for i in range(len(mask)) if mask[i]),
        key=lambda node: -abs(sizes[node[0]][node[1]].item()),
    )
    on = {place: torch.zeros_like(mask) for place, mask in allowed.items()}
    for place, i in order:
        on[place][i] = True
        with torch.no_grad(), ablated(model, on, means):
            calibration = calibrate(answer_differences(model, fitted_on), fitted_on.sign)
            loss = task_loss(answer_differences(model, judge), judge.sign, *calibration).item()
        if loss <= 0.1:
            break
    joined = on_paths(model, range(12), [4, 5], on)  # the last node may have no other to go on from
    assert names(circuit) == {
        f"{place}.{i}" for place, mask in joined.items() for i in mask.nonzero().squeeze(1).tolist()
    }
    assert 4 <= sum(int(mask.sum()) for mask in on.values()) < len(order)


def test_what_cannot_be_reached_and_what_repeats_itself_is_refused_in_one_line():
    with pytest.raises(search.TargetNotReached, match=r"'planted' does not come under target_loss=0\.15") as error:
        prune(
            planted_model(),
            planted_pairs(shuffled=True),
            text=planted_text(),
            method="attribution",
            progress=False,
        )
    assert error.value.loss > 0.15
    for settings, message in (
        ({"method": "attribution", "seeds": 2}, "seeds=2 with method='attribution' would repeat one search"),
        ({"method": "gradients"}, "method='gradients' is invalid: Input should be 'masks' or 'attribution'"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            PruneConfig().with_settings(settings)
        assert "\n" not in str(refused.value)
