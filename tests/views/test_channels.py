import pytest
import torch
from pairs import gpt2, join, sparse_model, tokens, toy_task, with_units
from planted import planted_model, planted_pairs, planted_text

from bridges.channels.feature import feature
from bridges.channels.prompts import frozen_pair
from bridges.circuits.features import node_activations, token_names
from bridges.io.progress import Bar
from bridges.views.channels import BINS, channel_steps, channel_views, histogram


class CountingBar(Bar):
    done = 0

    def advance(self, steps=1, note=None):
        self.done += steps


def joined():
    """A dense and a sparse model with bridges whose units are measured."""
    pair = with_units(join(gpt2(), sparse_model()))
    return pair.dense.model, pair.sparse.model, pair.bridge_set


def test_many_nodes_at_once_are_what_feature_says_of_each():
    dense, sparse, bridge_set = joined()
    text, names = tokens(20, 7), token_names(None, 17)
    nodes = ["0.attn.read.3", "1.mlp.write.2", "1.attn.q.1", "final.read.5"]
    bar = CountingBar()
    with frozen_pair(dense, sparse, bridge_set, check_models=False) as pair:
        views = channel_views(sparse, dict.fromkeys(nodes, ()), text, names, pair, bar)
    assert bar.done == channel_steps(len(nodes), text)
    for node in nodes:
        options = {"dense": dense, "bridge_set": bridge_set, "check_models": False, "progress": False}
        expected = feature(sparse, node, text, contexts=6, weights=12, **options).to_dict()
        assert {name: views[node][name] for name in expected} == expected
    assert views["1.attn.q.1"]["decoder_column"] is None
    column = bridge_set["final"].decoder_weight[:, 5]
    largest = views["final.read.5"]["decoder_column"]
    assert largest[0] == (int(column.abs().argmax()), column[column.abs().argmax()].item())


def test_without_a_dense_model_there_is_no_dense_side():
    view = channel_views(planted_model(), {"0.attn.read.0": ()}, planted_text(), token_names(None, 12))["0.attn.read.0"]
    assert view["dense"] is None and view["decoder_column"] is None and view["no_dense_side"] == ""


def test_histograms_count_every_value_that_is_not_zero():
    model, text = planted_model(), planted_text()
    found = channel_views(model, {"0.attn.read.0": ()}, text, token_names(None, 12))["0.attn.read.0"]["histogram"]
    values = node_activations(model, "0.attn.read.0", text)
    assert sum(found["counts"]) == (values != 0).sum() and len(found["edges"]) == BINS + 1
    assert found["edges"][0] == values[values != 0].min() and found["edges"][-1] == values.max()
    assert histogram(torch.zeros(0)) is None
    assert histogram(torch.ones(3))["counts"].count(3) == 1


def test_on_a_tasks_prompts_values_stand_at_every_token_and_padding_is_left_out():
    model, pairs = planted_model(), planted_pairs(4)
    view = channel_views(model, {"0.attn.read.0": [pairs]}, planted_text(), token_names(None, 12))["0.attn.read.0"]
    contexts = view["task_contexts"]["planted"]
    expected = node_activations(model, "0.attn.read.0", torch.stack([pairs.input_ids[1], pairs.counterfactual_ids[1]]))
    assert len(contexts) == 4
    assert contexts[2]["values"] == expected[0].tolist() and contexts[3]["values"] == expected[1].tolist()
    assert contexts[2]["at"] == expected[0].abs().argmax() and contexts[2]["value"] == expected[0].abs().max() * (
        expected[0][contexts[2]["at"]].sign()
    )
    # The cue of the first prompt stands at another sign than that of its counterfactual.
    assert contexts[2]["value"] * contexts[3]["value"] < 0


def test_prompts_show_the_encoders_reading_without_their_padding():
    dense, sparse, bridge_set = joined()
    pairs = toy_task()
    with frozen_pair(dense, sparse, bridge_set, check_models=False) as pair:
        views = channel_views(sparse, {"1.attn.read.4": [pairs]}, tokens(8, 7), token_names(None, 17), pair)
    contexts = views["1.attn.read.4"]["task_contexts"][pairs.task]
    for context, i in zip(contexts, (0, 0, 1, 1), strict=True):
        assert len(context["tokens"]) == len(context["readings"]) == pairs.attention_mask[i].sum()
    assert views["1.attn.read.4"]["dense"]["task"] == pairs.task


def test_a_node_that_is_not_in_the_model_is_refused():
    with pytest.raises(ValueError, match="not in the model"):
        channel_views(planted_model(), {"0.attn.read.99": ()}, planted_text(), token_names(None, 12))
