"""The dense side of feature() against loops in float64, and where the truth is known: a model bridged to itself."""

import json

import pytest
import torch
from pairs import VOCAB, at, gpt2, join, naive_encode, naive_kl, real_places, sparse_model, tokens, toy_task, with_units
from planted import ANSWER_A, ANSWER_B, planted_model, planted_pairs, planted_text

import bridges
from bridges.bridge import Bridge, BridgeSet
from bridges.channels.dense_side import N_RANDOM, effect_rows, encoder_readings, find_bridged
from bridges.channels.feature import feature
from bridges.circuits.feature_view import Feature
from bridges.circuits.features import node_activations
from bridges.circuits.nodes import Node
from bridges.io.progress import Bar
from bridges.objective.pair import ModelPair

TEXT = tokens(6, 7, seed=11)
QUIET = {"progress": False, "contexts": 3}


def look(pair, node, text=TEXT, **options):
    return feature(pair.sparse, node, text, dense=pair.dense, bridge_set=pair.bridge_set, **{**QUIET, **options})


def naive_readings(pair, site, channel, is_read):
    """What the encoder says of a channel, token by token, in the node's units."""
    bridge = pair.bridge_set[site]
    z = naive_encode(bridge, pair.dense.residuals(TEXT)[0][pair.dense.sites.index(site)])[..., channel]
    return z * bridge.gain_sparse[channel] / bridge.rms_sparse if is_read else z


def naive_correlation(x, y):
    x, y = x.flatten().tolist(), y.flatten().tolist()
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    squares = [sum((a - mean) ** 2 for a in values) for values, mean in ((x, mean_x), (y, mean_y))]
    return products / (squares[0] * squares[1]) ** 0.5


def naive_quantile(values, q):
    """Between the two nearest of the sorted values."""
    values = sorted(values)
    place = q * (len(values) - 1)
    low = int(place)
    return values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])


@pytest.mark.parametrize(
    ("node", "site", "is_read"),
    [
        ("0.attn.read.4", "0.attn", True),
        ("1.attn.read.10", "1.attn", True),
        ("final.read.7", "final", True),
        ("0.attn.write.9", "0.mlp", False),
        ("0.mlp.write.7", "1.attn", False),
        ("1.mlp.write.7", "final", False),
    ],
)
@torch.no_grad()
def test_the_dense_side_is_what_loops_give(pair, node, site, is_read):
    found = look(pair, node).dense
    channel, bridge = int(node.rpartition(".")[2]), pair.bridge_set[site]
    assert (found.site, found.dense_site, found.channel, found.tokens) == (site, site, channel, TEXT.numel())
    values = node_activations(pair.sparse, node, TEXT)
    readings = naive_readings(pair, site, channel, is_read)
    assert found.encoder_correlation == pytest.approx(naive_correlation(values, readings), abs=1e-10)
    both = sum(v != 0 and r != 0 for v, r in zip(values.flatten(), readings.flatten(), strict=True))
    either = sum(v != 0 or r != 0 for v, r in zip(values.flatten(), readings.flatten(), strict=True))
    assert 0 < both <= either
    assert found.both_active == pytest.approx(both / TEXT.numel())
    assert found.either_active == pytest.approx(either / TEXT.numel())

    added = naive_quantile([abs(v) for v in values.flatten().tolist() if v], 0.99)
    assert found.added == pytest.approx(added, rel=1e-10)
    delta = added * (bridge.rms_sparse / bridge.gain_sparse[channel] if is_read else 1.0)
    column = bridge.decoder_weight[:, channel] * delta
    streams, logits = pair.dense.residuals(TEXT)
    stream, places = streams[pair.dense.sites.index(site)], real_places(TEXT, None)

    def edited(addend):
        return pair.dense.run_from(site, stream + addend, TEXT)

    change = at(edited(column) - logits, places).mean(0)
    order = sorted(range(VOCAB), key=lambda token: -change[token].item())
    raised = [(f"[{token}]", change[token].item()) for token in order if change[token] > 0][:10]
    lowered = [(f"[{token}]", change[token].item()) for token in reversed(order) if change[token] < 0][:10]
    for listed, expected in ((found.raised, raised), (found.lowered, lowered)):
        assert [token for token, _ in listed] == [token for token, _ in expected]
        assert [value for _, value in listed] == pytest.approx([value for _, value in expected], rel=1e-8)
    assert found.kl == pytest.approx(naive_kl(logits, edited(column), places).item(), rel=1e-8)
    generator = torch.Generator().manual_seed(0)
    random = [torch.randn(8, generator=generator).double() for _ in range(N_RANDOM)]
    kls = [naive_kl(logits, edited(one / one.norm() * column.norm()), places).item() for one in random]
    assert found.kl_random == pytest.approx(sum(kls) / N_RANDOM, rel=1e-6)


@torch.no_grad()
def test_contexts_hold_the_readings_of_their_tokens(pair):
    found = look(pair, "1.attn.read.10")
    readings = naive_readings(pair, "1.attn", 10, True)
    for context in (*found.positive, *found.negative, *found.random):
        start = context.position - context.at
        expected = readings[context.row, start : start + len(context.tokens)]
        assert context.readings == pytest.approx(expected.tolist(), abs=1e-12)
        assert f" {context.readings[context.at]:+.3f}  " in str(context)
    plain = feature(pair.sparse, "1.attn.read.10", TEXT, contexts=3)
    assert plain.dense is None and all(context.readings is None for context in plain.positive)
    assert [context.value for context in plain.positive] == [context.value for context in found.positive]


@torch.no_grad()
def test_the_mean_difference_is_that_of_the_tokens_whose_read_the_prompts_change(pair):
    task = toy_task()
    found = look(pair, "1.attn.read.3", task=task).dense
    streams, reads = (
        [method(ids) for ids in (task.input_ids, task.counterfactual_ids)]
        for method in (lambda ids: pair.dense.residuals(ids)[0][2], lambda ids: pair.sparse.reads(ids)[2][..., 3])
    )
    changes, total = (reads[1] - reads[0]).abs(), torch.zeros(8, dtype=torch.float64)
    for row in range(6):
        for place in range(7):
            if changes[row, place] > 1e-3 * changes.max():
                sign = 1 if task.direction[row] == 0 else -1
                total += sign * (streams[1][row, place] - streams[0][row, place])
    column = pair.bridge_set["1.attn"].decoder_weight[:, 3]
    cosine = (total @ column / (total.norm() * column.norm())).item()
    assert found.task == "toy" and found.mean_difference == pytest.approx(cosine, abs=1e-10)
    one_way = task.take(torch.tensor([0, 2, 4]))
    assert look(pair, "1.attn.read.3", task=one_way).dense.mean_difference is not None
    same = task.replaced(counterfactual_ids=task.input_ids)
    unchanged = look(pair, "1.attn.read.3", task=same)
    assert unchanged.dense.mean_difference is None and "the prompts do not change the channel" in str(unchanged)


def bridged_to_itself(model):
    """The model as its own dense model: identity maps, R and gain as measured."""
    chain, width = bridges.as_residual(model), model.config.d_model
    found = []
    for i in range(len(chain.sites)):
        bridge = Bridge(width, width, width, torch.float64)
        stream = chain.residuals(planted_text())[0][i]
        with torch.no_grad():
            bridge.encoder_weight.copy_(torch.eye(width))
            bridge.decoder_weight.copy_(torch.eye(width))
            for name in ("rms_dense", "rms_sparse"):
                getattr(bridge, name).copy_(stream.square().mean(-1).sqrt().mean())
            bridge.gain_sparse.copy_(chain.norm(i).gain)
        found.append(bridge)
    return ModelPair(chain, chain, BridgeSet([(site, site) for site in chain.sites], found))


def test_of_a_model_bridged_to_itself_the_encoder_reads_each_nodes_value():
    model = planted_model()
    with torch.no_grad():  # embeddings of one length, so that every token's RMS is R
        embedding = model.transformer.wte.weight
        embedding /= embedding.norm(dim=1, keepdim=True)
        model.blocks[0].ln_1.weight.copy_(torch.linspace(0.5, 2, 16))
        pair = bridged_to_itself(model)
    # Nothing but this write is in its channel of the stream.
    for node in ("0.attn.read.0", "0.attn.read.9", "0.attn.write.1"):
        found = look(pair, node, planted_text())
        values = node_activations(model, node, planted_text())
        assert found.dense.encoder_correlation == pytest.approx(1, abs=1e-12)
        assert found.dense.both_active == found.dense.either_active == pytest.approx(found.density)
        for context in (*found.positive, *found.negative, *found.random):
            assert context.readings == pytest.approx(context.values, rel=1e-12)
            assert context.readings[context.at] == pytest.approx(values[context.row, context.position].item())


def test_a_planted_channel_moves_its_answers_and_points_against_its_second_cue():
    pair = bridged_to_itself(planted_model())
    found = look(pair, "0.attn.write.1", planted_text(), task=planted_pairs(16)).dense
    assert found.raised[0][0] == f"[{ANSWER_A}]" and found.lowered[0][0] == f"[{ANSWER_B}]"
    assert found.raised[0][1] > 3 * found.raised[1][1] > 0 > found.lowered[0][1]
    assert found.kl > found.kl_random > 0
    # The channel is positive after the task's first cue.
    assert -1 < found.mean_difference < -0.1


def test_a_channel_that_is_never_active_adds_nothing():
    found = look(bridged_to_itself(planted_model()), "0.attn.read.5", planted_text())
    assert found.density == 0 and found.dense.encoder_correlation is None and found.dense.either_active == 0
    assert (found.dense.added, found.dense.kl, found.dense.kl_random) == (0, 0, 0)
    assert not found.dense.raised and not found.dense.lowered
    assert "correlation undefined" in str(found) and "logits raised: none" in str(found)


def test_other_nodes_have_no_dense_side_and_say_why():
    pair = with_units(join(gpt2(), sparse_model(d_pos_emb=3)))
    for node in ("1.attn.q.3", "0.mlp.neuron.2", "0.attn.read.12"):
        found = look(pair, node)
        assert found.dense is None and found.no_dense_side == f"{node} is no channel of the residual stream"
        assert str(found).splitlines()[-1] == f"no dense side: {node} is no channel of the residual stream"
        assert all(context.readings is None for context in found.random)
    few = ModelPair(pair.dense, pair.sparse, BridgeSet([("1.mlp", "1.mlp")], [pair.bridge_set["1.mlp"]]))
    assert look(few, "0.attn.read.3").no_dense_side == "there is no bridge at 0.attn, only at 1.mlp"
    assert look(few, "1.mlp.write.3").no_dense_side == "there is no bridge at final, only at 1.mlp"
    # A write stays in the stream: its channel is looked up at the next site that has a bridge.
    assert look(few, "0.attn.write.3").dense.site == "1.mlp"


def test_a_bridge_between_sites_of_other_names_is_used_at_the_dense_models_own():
    pair = with_units(join(gpt2(layers=1), sparse_model(), site_map=[("0.mlp", "1.attn")]))
    found, bridge = look(pair, "1.attn.read.3").dense, pair.bridge_set[0]
    assert (found.site, found.dense_site) == ("1.attn", "0.mlp")
    with torch.no_grad():
        streams, logits = pair.dense.residuals(TEXT)
        addend = bridge.decoder_weight[:, 3] * found.added * bridge.rms_sparse / bridge.gain_sparse[3]
        kl = naive_kl(logits, pair.dense.run_from("0.mlp", streams[1] + addend, TEXT), real_places(TEXT, None))
    assert found.kl == pytest.approx(kl.item(), rel=1e-8)


def test_it_prints_both_values_and_is_json(pair):
    found = look(pair, "1.attn.read.10", task=toy_task())
    text = str(found)
    assert "contexts: the node's value, and the encoder's reading of the dense model" in text
    assert f"correlation {found.dense.encoder_correlation:+.3f} with the node" in text
    assert f"logits raised: '{found.dense.raised[0][0]}' {found.dense.raised[0][1]:+.3f}, " in text
    assert f"mean difference of toy: {found.dense.mean_difference:+.3f}" in text
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["dense"]["site"] == "1.attn" and values["dense"]["raised"][0] == list(found.dense.raised[0])
    assert values["positive"][0]["readings"] == found.positive[0].readings


def test_it_shows_what_the_node_does_on_prompts_of_the_task_with_and_without_a_dense_model(pair):
    task, node = toy_task(), "1.attn.read.10"
    alone = feature(pair.sparse, node, TEXT, task=task, progress=False)
    beside = look(pair, node, task=task)
    given = [ids[i] for i in range(2) for ids in (task.input_ids, task.counterfactual_ids)]
    assert len(alone.prompts) == len(beside.prompts) == 4 and alone.task == beside.task == "toy"
    for ids, shown, read in zip(given, alone.prompts, beside.prompts, strict=True):
        values = node_activations(pair.sparse, node, ids[None])[0]
        assert shown.values == pytest.approx(values.tolist()) and shown.value == shown.values[shown.at]
        assert shown.at == int(values.abs().argmax()) and shown.readings is None
        encoded = encoder_readings(pair, find_bridged(Node.parse(node), pair), ids[None], Bar())[0]
        assert read.readings == pytest.approx(encoded.tolist()) and read.values == shown.values
    assert "on prompts of toy, both of a pair:" in str(alone)
    assert Feature.from_dict(json.loads(json.dumps(beside.to_dict()))) == beside
    assert Feature.from_dict({k: v for k, v in look(pair, node).to_dict().items() if k not in ("task", "prompts")})


def test_logits_are_measured_on_a_part_of_the_text():
    assert effect_rows(torch.zeros(100, 64, dtype=torch.long)).shape == (32, 64)
    assert effect_rows(torch.zeros(3, 5000, dtype=torch.long)).shape == (1, 5000)


def test_what_does_not_fit_is_refused_in_one_line(pair):
    dense, sparse, bridge_set = pair
    unmeasured = join(gpt2(), sparse_model())
    refused = [
        ({"dense": dense}, "bridge_set=None, but dense is given"),
        ({"bridge_set": bridge_set}, "dense=None, but bridge_set is given"),
        ({"task": "for_while"}, "task='for_while' needs tokenizer="),
        ({"dense": dense, "bridge_set": unmeasured.bridge_set}, "site='1.attn': rms and gain .* use bridges that fit"),
        ({"dense": dense, "bridge_set": bridge_set, "task": "for_while"}, "task='for_while' needs tokenizer="),
        ({"dense": gpt2(context=10), "bridge_set": bridge_set, "text": tokens(2, 11)}, "text has rows of 11 tokens"),
    ]
    for arguments, message in refused:
        with pytest.raises(ValueError, match=message) as error:
            feature(sparse, "1.attn.read.3", **{"text": TEXT, "progress": False, **arguments})
        assert "\n" not in str(error.value)


def test_bridges_of_other_models_are_refused(pair):
    bridge_set = BridgeSet(pair.bridge_set.site_pairs, list(pair.bridge_set))
    bridge_set.record_models(gpt2(seed=8), pair.sparse)
    arguments = {"dense": pair.dense, "bridge_set": bridge_set, **QUIET}
    with pytest.raises(ValueError, match="is not the model that these bridges were fitted to"):
        feature(pair.sparse, "1.attn.read.3", TEXT, **arguments)
    assert feature(pair.sparse, "1.attn.read.3", TEXT, check_models=False, **arguments).dense is not None
