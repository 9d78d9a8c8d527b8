import json

import pytest
import torch
from pairs import gpt2, join, sparse_model, tokens

import bridges
from bridges.channels.from_circuit import circuit_to_dense, stream_channels
from bridges.circuits.circuit import Circuit
from bridges.tasks.pairs import TaskPairs

SITES = ["0.attn", "0.mlp", "1.attn", "1.mlp", "final"]
KINDS = ("attn.read", "attn.q", "attn.write", "mlp.read", "mlp.write")
PLACES = [f"{layer}.{kind}" for layer in (0, 1) for kind in KINDS]


def circuit(**nodes):
    """Nodes given as n0_attn_read=[3], in a model of two layers."""
    given = {place: tuple(nodes.get("n" + place.replace(".", "_"), ())) for place in PLACES}
    return Circuit("mine", {**given, "final.read": tuple(nodes.get("final_read", ()))}, [], {})


def task():
    ids = tokens(12, 6, seed=1)
    other = ids.clone()
    other[:, 2] = (other[:, 2] + 5) % 17
    mask = torch.ones_like(ids)
    answers, targets = torch.full((12, 1), 3), torch.full((12, 1), 4)
    return TaskPairs("mine", ids, other, mask, answers, targets, torch.arange(12) % 2)


def test_reads_are_of_their_own_site_and_writes_of_the_next():
    found, skipped = stream_channels(
        circuit(
            n0_attn_read=[3], n0_attn_write=[3, 5], n0_mlp_write=[1], n1_mlp_write=[2], n0_attn_q=[0], final_read=[2]
        ),
        SITES,
        12,
    )
    assert [(one.site, one.channel, one.nodes) for one in found] == [
        ("0.attn", 3, ("0.attn.read.3",)),
        ("0.mlp", 3, ("0.attn.write.3",)),
        ("0.mlp", 5, ("0.attn.write.5",)),
        ("1.attn", 1, ("0.mlp.write.1",)),
        ("final", 2, ("1.mlp.write.2", "final.read.2")),
    ]
    assert not skipped
    found, skipped = stream_channels(circuit(n0_attn_read=[3, 12], n0_attn_write=[4]), ["0.attn"], 12)
    assert [one.channel for one in found] == [3] and skipped == ["0.attn.read.12", "0.attn.write.4"]


def test_each_effect_is_that_of_steering_and_all_of_a_site_go_together():
    pair, pairs = join(gpt2(), sparse_model()), task()
    for bridge in pair.bridge_set:
        for name in ("rms_dense", "rms_sparse"):
            getattr(bridge, name).fill_(1.3)
        bridge.gain_sparse.copy_(torch.linspace(0.5, 1.5, 12))
    given = circuit(n1_attn_read=[2, 7], n1_mlp_write=[4])
    found = circuit_to_dense(pair.dense, pair.sparse, pair.bridge_set, given, pairs, check_models=False)
    assert [(e.site, e.channels) for e in found.nodes] == [("1.attn", (2,)), ("1.attn", (7,)), ("final", (4,))]
    assert [(e.site, e.channels) for e in found.together] == [("1.attn", (2, 7)), ("final", (4,))]
    dense = pair.dense.model
    for effect in (*found.nodes, *found.together):
        edits = bridges.counterfactual(
            pair.sparse, effect.site, effect.channels, pairs.input_ids, pairs.counterfactual_ids
        )
        options = {"sparse": pair.sparse, "at": "residual", "check_models": False}
        with torch.no_grad(), bridges.steer(dense, pair.bridge_set, edits, **options):
            p = dense(pairs.input_ids).logits[:, -1].softmax(-1)[:, 4].mean().item()
        assert effect.p_target == pytest.approx(p, rel=1e-6)
    with torch.no_grad():
        p = dense(pairs.input_ids).logits[:, -1].softmax(-1)[:, 4].mean().item()
    assert found.p_target_unedited == pytest.approx(p, rel=1e-9)
    assert torch.equal(found.directions["1.attn.7"], pair.bridge_set["1.attn"].decoder_weight[:, 7])
    assert json.loads(json.dumps(found.to_dict()))["together"][0]["nodes"] == ["1.attn.read.2", "1.attn.read.7"]
    assert "1.attn    2,7" in str(found)


def test_a_circuit_without_a_residual_node_is_refused():
    pair = join(gpt2(), sparse_model())
    with pytest.raises(ValueError, match="no read or write at a bridged site"):
        circuit_to_dense(pair.dense, pair.sparse, pair.bridge_set, circuit(n0_attn_q=[1]), task(), check_models=False)
