"""Graphs of circuits whose numbers are known: by hand, by finite differences, by the model's own logits."""

import copy
import json
import math
from importlib.resources import files

import pytest
import torch
from pairs import sparse_model, tokens
from planted import ANSWER_A, ANSWER_B, CUE_A, CUE_B, PATH, planted_model, planted_pairs, planted_text

import bridges
from bridges.circuits.circuit import Circuit, edges_between
from bridges.circuits.nodes import node_means, place_sizes, recorded_nodes, replaced_nodes
from bridges.circuits.task_loss import Presented, answer_differences, task_loss
from bridges.demo import demo_circuit
from bridges.interop.neuronpedia import export_graph
from bridges.io.fingerprint import fingerprint
from bridges.tasks.pairs import TaskPairs

SCHEMA = json.loads((files("bridges") / "interop" / "neuronpedia_schema.json").read_text())


def circuit_of(model, nodes, text, **fields):
    """The circuit of some nodes, given by name."""
    by_place = {place: () for place in place_sizes(model)}
    for name in nodes:
        place, _, index = name.rpartition(".")
        by_place[place] = tuple(sorted({*by_place[place], int(index)}))
    circuit = Circuit("mine", by_place, [], node_means(model, [(text, None)]), fingerprint=fingerprint(model), **fields)
    return Circuit(**{**vars(circuit), "edges": edges_between(model, circuit.masks(model))})


def random_circuit(model, share=0.4):
    generator = torch.Generator().manual_seed(4)
    sizes = place_sizes(model).items()
    nodes = [f"{p}.{i}" for p, n in sizes for i in range(n) if torch.rand((), generator=generator) < share]
    return circuit_of(model, nodes, tokens(seed=3), scale=0.7, shift=0.2)


def random_pairs(changed=(2, 6)):
    """Prompts of seven tokens that differ in some; answers are sets of one and two tokens."""
    ids = tokens(seed=1)
    other = ids.clone()
    other[:, changed] = (other[:, changed] + 3) % 17
    answers, targets = torch.tensor([[1, 2]] * 4), torch.tensor([[8, -1]] * 4)
    return TaskPairs("mine", ids, other, torch.ones_like(ids), answers, targets, torch.arange(4) % 2)


def exported(path, circuit, model, **options):
    export_graph(circuit, model, path / "graph.json", **options)
    return json.loads((path / "graph.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def planted():
    model = planted_model()
    return model, circuit_of(model, PATH, planted_text())


def links_by_name(graph):
    names = {node["node_id"]: node["clerp"] for node in graph["nodes"]}
    return {(names[link["source"]], names[link["target"]]): link["weight"] for link in graph["links"]}


@pytest.mark.parametrize("row", [0, 1])
def test_a_planted_circuit_is_drawn_from_its_cue_to_its_answers_with_the_weights_put_in(planted, tmp_path, row):
    model, circuit = planted
    pairs = planted_pairs()
    graph = exported(tmp_path, circuit, model, pairs=pairs, row=row)
    prompt, other = pairs.input_ids[row], pairs.counterfactual_ids[row]
    cue, last = int((prompt != other).nonzero()), len(prompt) - 1
    sign = 1 if prompt[cue] == CUE_A else -1
    positions = {node["clerp"]: node["ctx_idx"] for node in graph["nodes"]}
    assert [positions[name] for name in PATH] == [cue, cue, last, last]
    with torch.no_grad(), circuit.apply(model), recorded_nodes(model) as values:
        model(torch.stack([prompt, other]))
    change = {}
    for name in PATH:
        place, _, index = name.rpartition(".")
        original, changed = values[place][:, positions[name], int(index)].tolist()
        change[name] = original - changed
        assert next(n for n in graph["nodes"] if n["clerp"] == name)["activation"] == pytest.approx(original)
    read, v, write, final = PATH
    right, wrong = (ANSWER_A, ANSWER_B) if sign == 1 else (ANSWER_B, ANSWER_A)
    tokens_of = {
        token: node["clerp"] for node in graph["nodes"] for token in (right, wrong) if f'"[{token}]"' in node["clerp"]
    }
    assert links_by_name(graph) == pytest.approx({
        (f'Emb: "[{prompt[cue]}]"', read): 4.0 * sign,
        (read, v): change[read],
        (v, write): change[v],
        (write, final): change[write],
        (final, tokens_of[right]): 3.0 * sign * change[final],
        (final, tokens_of[wrong]): -3.0 * sign * change[final],
    })  # fmt: skip
    assert {CUE_A, CUE_B} == {int(prompt[cue]), int(other[cue])} and sign * change[final] > 0


def test_what_a_logit_gets_is_what_it_changes_by_between_the_prompts(tmp_path):
    """The unembedding is linear, and other reads are at their means in both prompts."""
    model, pairs = sparse_model(d_pos_emb=3).eval(), random_pairs()
    circuit = random_circuit(model)
    graph = exported(tmp_path, circuit, model, pairs=pairs, row=2)
    with torch.no_grad(), circuit.apply(model):
        logits = model(torch.stack([pairs.input_ids[2], pairs.counterfactual_ids[2]])).logits[:, -1]
    answers = [node for node in graph["nodes"] if node["feature_type"] == "logit"]
    assert [node["feature"] for node in answers] == [max((1, 2), key=lambda token: logits[0, token]), 8]
    for node in answers:
        change = (logits[0, node["feature"]] - logits[1, node["feature"]]).item()
        got = sum(link["weight"] for link in graph["links"] if link["target"] == node["node_id"])
        assert got == pytest.approx(change, abs=1e-10) and abs(change) > 1e-3


@pytest.mark.parametrize("row", [1, 3])
def test_a_node_stands_where_the_other_prompts_value_would_change_the_answer_most(tmp_path, row):
    """By finite differences, in both prompts."""
    model, pairs = sparse_model().eval(), random_pairs(changed=(1, 3))
    circuit, seq = random_circuit(model), 7
    graph = exported(tmp_path, circuit, model, pairs=pairs, row=row)
    prompts = Presented.of(pairs.take(torch.tensor([row])), "cpu")
    with torch.no_grad(), circuit.apply(model), recorded_nodes(model) as found:
        model(prompts.input_ids)
        values = dict(found)
    # Both prompts once for each position, at which one node is moved.
    rows, positions = torch.tensor([0] * seq + [1] * seq), torch.arange(seq).repeat(2)
    many = prompts.take(rows)

    @torch.no_grad()
    def slopes(place, index, step=1e-6):
        change = (values[place][0] - values[place][1])[positions, index]

        def differences(share):
            def moved(x):
                x = x.clone()
                x[torch.arange(2 * seq), positions, index] += share * change
                return x

            with circuit.apply(model), replaced_nodes(model, {place: moved}):
                logits = model(many.input_ids).logits[:, -1]
            first, second = (many.right.logsumexp(logits) - many.other.logsumexp(logits)).view(2, seq)
            return first - second  # the gradients' sum, which is twice their mean

        return ((differences(step) - differences(-step)).abs() / (2 * step)).tolist()

    placed = [node for node in graph["nodes"] if node["feature_type"] == "cross layer transcoder"]
    assert len(placed) == circuit.n_nodes
    found = set()
    for node in placed:
        place, _, index = node["clerp"].rpartition(".")
        expected = slopes(place, int(index))
        if max(expected) > 1e-6:
            assert expected[node["ctx_idx"]] == pytest.approx(max(expected), rel=1e-4), node
            found.add(node["ctx_idx"])
    assert len(found) > 2


def test_writes_reach_later_reads_of_their_channel_alone(tmp_path):
    model, pairs = sparse_model().eval(), random_pairs()
    graph = exported(tmp_path, random_circuit(model), model, pairs=pairs)
    places = list(place_sizes(model))
    hops = [ends for ends in links_by_name(graph) if ends[0].rpartition(".")[0].endswith("write")]
    for source, target in hops:
        (written, channel), (read, other) = (name.rpartition(".")[::2] for name in (source, target))
        assert read.endswith("read") and channel == other and places.index(written) < places.index(read)
    assert any("0.attn.write" in source and "final.read" in target for source, target in hops)


def test_the_graph_has_the_published_schema_and_every_link_its_nodes(tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    pair = bridges.load_pair()
    graph = exported(tmp_path, demo_circuit(pair), pair.sparse, tokenizer=pair.tokenizer)
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    jsonschema.validate(graph, SCHEMA)
    for path in (("metadata", "slug"), ("nodes", 0, "clerp"), ("links", 0, "weight"), ("qParams",)):
        damaged = copy.deepcopy(graph)
        parent = damaged
        for key in path[:-1]:
            parent = parent[key]
        del parent[path[-1]]
        with pytest.raises(jsonschema.ValidationError, match=f"'{path[-1]}' is a required property"):
            jsonschema.validate(damaged, SCHEMA)


def test_the_bundled_circuit_is_one_chain_from_the_quote_to_the_answers(tmp_path):
    pair = bridges.load_pair()
    circuit = demo_circuit(pair)
    graph = exported(tmp_path, circuit, pair.sparse, tokenizer=pair.tokenizer, slug="quotes", scan="bundled")
    ids = [node["node_id"] for node in graph["nodes"]]
    assert len(ids) == len(set(ids)) and {end for link in graph["links"] for end in list(link.values())[:2]} <= {*ids}
    kinds = [node["feature_type"] for node in graph["nodes"]]
    prompt_tokens = graph["metadata"]["prompt_tokens"]
    assert (kinds.count("embedding"), kinds.count("logit")) == (len(prompt_tokens), 2)
    assert (graph["metadata"]["slug"], graph["metadata"]["scan"]) == ("quotes", "bundled")
    links = links_by_name(graph)
    assert {(edge.source, edge.target) for edge in circuit.edges} <= links.keys()
    quote = next(node for node in graph["nodes"] if node["clerp"] == "0.mlp.read.753")["ctx_idx"]
    assert "'" in prompt_tokens[quote]
    unlinked = {node["node_id"] for node in graph["nodes"]} - {*graph["qParams"]["pinnedIds"]}
    assert unlinked == {
        n["node_id"] for n in graph["nodes"] if n["feature_type"] == "embedding" and n["ctx_idx"] != quote
    }


def test_both_answers_can_be_read_out_of_their_labels_as_the_viewers_do(tmp_path):
    pair = bridges.load_pair()
    graph = exported(tmp_path, demo_circuit(pair), pair.sparse, tokenizer=pair.tokenizer)
    answers = [node for node in graph["nodes"] if node["feature_type"] == "logit"]
    # circuit-tracer's util-cg.js and Neuronpedia's utils.ts: what stands between the first two straight quotes.
    assert sorted(node["clerp"].split('"')[1] for node in answers) == ["')", "\N{RIGHT DOUBLE QUOTATION MARK})"]
    for node in answers:
        assert float(node["clerp"].split("(p=")[1].split(")")[0]) == pytest.approx(node["token_prob"], abs=5e-4)


def test_probabilities_are_those_of_the_circuits_loss(tmp_path):
    model, pairs = sparse_model().eval(), random_pairs()
    circuit = random_circuit(model)
    for row in range(2):  # one of each direction
        graph = exported(tmp_path, circuit, model, pairs=pairs, row=row)
        prompts = Presented.of(pairs.take(torch.tensor([row])), "cpu").take(torch.tensor([0]))
        with torch.no_grad(), circuit.apply(model):
            loss = task_loss(answer_differences(model, prompts), prompts.sign, circuit.scale, circuit.shift).item()
        right, other = (node for node in graph["nodes"] if node["feature_type"] == "logit")
        assert -math.log(right["token_prob"]) == pytest.approx(loss)
        assert right["is_target_logit"] and not other["is_target_logit"]
        assert right["token_prob"] + other["token_prob"] == pytest.approx(1)
        assert f"(p={right['token_prob']:.3f})" in right["clerp"]


def test_padding_is_left_out_and_the_model_left_as_it_was(tmp_path):
    model, pairs = sparse_model().train(), random_pairs()
    circuit = random_circuit(model)
    padded = TaskPairs(
        "mine",
        torch.nn.functional.pad(pairs.input_ids, (3, 0)),
        torch.nn.functional.pad(pairs.counterfactual_ids, (3, 0)),
        torch.nn.functional.pad(pairs.attention_mask, (3, 0)),
        pairs.answer_sets,
        pairs.target_sets,
        pairs.direction,
    )
    graph = exported(tmp_path, circuit, model, pairs=padded)
    assert graph == exported(tmp_path, circuit, model, pairs=pairs)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert any(p.requires_grad for p in model.parameters()) and not any(m._forward_hooks for m in model.modules())


def test_line_breaks_are_shown_and_the_prompt_stays_as_it_is(tmp_path):
    pair = bridges.load_pair()
    circuit = circuit_of(pair.sparse, ["final.read.0"], tokens())
    pairs = bridges.task_pairs("for_while", pair.tokenizer, 1)
    graph = exported(tmp_path, circuit, pair.sparse, tokenizer=pair.tokenizer, pairs=pairs)
    shown, prompt = "".join(graph["metadata"]["prompt_tokens"]), graph["metadata"]["prompt"]
    assert "\n" in prompt and shown == prompt.replace("\n", "⏎")


def test_what_cannot_be_drawn_is_refused_in_one_line(planted, tmp_path):
    model, circuit = planted
    path, pairs = tmp_path / "graph.json", planted_pairs(4)
    with pytest.raises(
        ValueError, match=r"tokenizer=None: prompts of the task 'mine' need one; pass tokenizer= or pairs="
    ):
        export_graph(circuit, model, path)
    with pytest.raises(ValueError, match="row=4 must be at least 0 and below 4"):
        export_graph(circuit, model, path, pairs=pairs, row=4)
    with pytest.raises(ValueError, match="row=-1 must be at least 0"):
        export_graph(circuit, model, path, tokenizer=object(), row=-1)
    with pytest.raises(ValueError, match="the circuit of 'mine' has no nodes"):
        export_graph(circuit_of(model, [], planted_text()), model, path, pairs=pairs)
    with pytest.raises(ValueError, match="belongs to another model"):
        export_graph(circuit, planted_model(seed=1), path, pairs=pairs)
    assert not path.exists()
