import json

import pytest
import torch
from pairs import gpt2, sparse_model, tokens
from planted import CUE_A, CUE_B, planted_model, planted_text

import bridges
from bridges.channels.feature import feature
from bridges.circuits.feature_view import Feature
from bridges.circuits.features import neighbours, node_activations
from bridges.circuits.nodes import place_sizes, recorded_nodes
from bridges.sparsity import projection


def test_activations_are_the_nodes_values_row_by_row():
    model, text = sparse_model().eval(), tokens(40, 7)
    with torch.no_grad(), recorded_nodes(model) as values:
        model(text)
    for node in ("0.attn.q.3", "1.mlp.neuron.5", "final.read.11"):
        place, _, index = node.rpartition(".")
        torch.testing.assert_close(node_activations(model, node, text), values[place][..., int(index)])


def test_a_planted_node_shows_its_cue_in_both_signs():
    found = feature(planted_model(), "0.attn.read.0", planted_text(), contexts=5)
    assert all(context.tokens[context.at] == f"[{CUE_A}]" for context in found.positive)
    assert all(context.tokens[context.at] == f"[{CUE_B}]" for context in found.negative)
    assert len(found.positive) == len(found.negative) == len(found.random) == 5
    values = node_activations(planted_model(), "0.attn.read.0", planted_text())
    assert found.density == pytest.approx((values != 0).double().mean().item()) and found.tokens == values.numel()
    assert found.positive[0].value == values.max() and found.negative[0].value == values.min()
    assert found.percentiles["50"] == pytest.approx(values[values != 0].median().item(), abs=2.1)
    assert len({context.row for context in found.positive}) == 5
    assert found.weights_in == [(f"token [{CUE_B}]", -2.0), (f"token [{CUE_A}]", 2.0)] or set(found.weights_in) == {
        (f"token [{CUE_A}]", 2.0),
        (f"token [{CUE_B}]", -2.0),
    }
    assert found.weights_out == [("0.attn.v.0", 1.0)]
    text = str(found)
    assert "most positive:" in text and f"⟦[{CUE_A}]⟧" in text and "weights out: 0.attn.v.0 +1.000" in text
    assert json.loads(json.dumps(found.to_dict()))["node"] == "0.attn.read.0"


def test_a_feature_is_read_back_from_its_dictionary_and_shortened():
    found = feature(planted_model(), "0.attn.read.0", planted_text(), contexts=5)
    again = Feature.from_dict(json.loads(json.dumps(found.to_dict() | {"more": 1})))
    assert again == found and str(again) == str(found)
    few = found.first(2)
    assert [len(one) for one in (few.positive, few.negative, few.random)] == [2, 2, 2]
    assert few.positive == found.positive[:2] and len(few.weights_out) == 1


def test_a_node_that_is_never_active_is_said_so():
    found = feature(planted_model(), "0.attn.v.15", planted_text())
    assert found.density == 0 and not found.positive and not found.percentiles
    assert "active at 0.00%" in str(found) and "most negative: none" in str(found)


def test_sources_and_targets_are_each_others_and_are_the_nonzero_weights():
    model = sparse_model(d_pos_emb=3)
    projection.project(model, 0.2, min_per_channel=0)
    names = [str(i) for i in range(17)]
    sources, targets = set(), set()
    for place, size in place_sizes(model).items():
        for i in range(size):
            incoming, outgoing = neighbours(model, f"{place}.{i}", names)
            sources |= {(name, f"{place}.{i}", weight) for name, weight in incoming if not name.startswith("token")}
            targets |= {(f"{place}.{i}", name, weight) for name, weight in outgoing if not name.startswith("token")}
    # Along the stream a read lists every write before it; a write lists the reads that have a use for it.
    by_weight = {edge for edge in sources if edge[1].split(".")[-2] != "read"}
    assert by_weight == {edge for edge in targets if edge[0].split(".")[-2] != "write"}
    matrices = [m for b in model.blocks for m in (b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj)]
    assert len(by_weight) == sum(int((m.weight != 0).sum()) for m in matrices)
    written = {target for _, target, _ in sources if target.split(".")[-2] == "write"}
    assert {edge for edge in targets if edge[0] in written} <= sources


def test_text_is_shown_by_the_bundled_tokenizer_and_a_wrong_node_is_refused():
    pair = bridges.load_pair()
    found = feature(pair.sparse, "final.read.5", tokenizer=pair.tokenizer, text_tokens=2048, contexts=3)
    assert found.tokens == 2048 and found.random
    shown = "".join(token for context in found.random for token in context.tokens)
    assert (
        shown == pair.tokenizer.decode(pair.tokenizer(shown, add_special_tokens=False).input_ids) and "[5]" not in shown
    )
    with pytest.raises(ValueError, match="is not in the model"):
        feature(pair.sparse, "7.attn.q.0")
    with pytest.raises(ValueError, match="must be a SparseTransformer"):
        feature(gpt2(), "0.attn.q.0")
