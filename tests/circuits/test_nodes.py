import pytest
import torch
from pairs import MASK, sparse_model, tokens

from bridges.circuits.masks import ablated
from bridges.circuits.nodes import Node, node_means, place_modules, place_sizes, recorded_nodes, replaced_nodes

MODELS = {
    "plain": {},
    "positions": {"d_pos_emb": 4},
    "tied": {"tied_unembed": True},
    "layer norms": {"rms_norm": False},
    "no AbsTopK": {"afrac": None},
    "relu": {"activation_type": "relu", "residual_activation_type": "relu"},
}


@pytest.fixture(params=MODELS)
def model(request):
    return sparse_model(**MODELS[request.param]).eval()


def test_every_place_records_as_many_nodes_as_it_has(model):
    sizes = place_sizes(model)
    assert list(sizes) == list(place_modules(model)) and sizes["final.read"] == 12
    with torch.no_grad(), recorded_nodes(model) as values:
        model(tokens())
    assert {place: x.shape[-1] for place, x in values.items()} == sizes


def test_the_nodes_are_what_the_matrices_multiply(model):
    """Reads, neurons and the final read are inputs of linear maps; q, k and v are outputs, writes are added."""
    inputs = {}
    block = model.blocks[1]
    modules = {"1.attn.read": block.attn.c_attn, "1.mlp.read": block.mlp.c_fc, "1.mlp.neuron": block.mlp.c_proj}
    handles = [
        module.register_forward_pre_hook(lambda _, args, place=place: inputs.update({place: args[0]}))
        for place, module in {**modules, "final.read": model.lm_head}.items()
    ]
    with torch.no_grad(), recorded_nodes(model) as values:
        streams = model(tokens(), output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    for place, x in inputs.items():
        assert torch.equal(values[place], x), place
    if model.config.residual_activation_type == "identity":
        moved = values["0.attn.write"] + values["0.mlp.write"]
        torch.testing.assert_close(streams[1] - streams[0], moved, rtol=1e-10, atol=1e-12)


def test_with_all_nodes_on_the_model_is_what_it_was_bit_for_bit(model):
    means = node_means(model, [(tokens(), MASK)])
    on = {place: torch.ones(size, dtype=torch.bool) for place, size in place_sizes(model).items()}
    with torch.no_grad():
        before = model(tokens()).logits
        with ablated(model, on, means):
            assert torch.equal(model(tokens()).logits, before)
        with ablated(model, {**on, "0.mlp.neuron": torch.zeros_like(on["0.mlp.neuron"])}, means):
            assert not torch.equal(model(tokens()).logits, before)
        assert torch.equal(model(tokens()).logits, before)


def test_with_no_node_on_every_place_is_at_its_mean_and_no_token_matters(model):
    means = node_means(model, [(tokens(), MASK)])
    off = {place: torch.zeros(size, dtype=torch.bool) for place, size in place_sizes(model).items()}
    with torch.no_grad(), ablated(model, off, means), recorded_nodes(model) as values:
        logits = model(tokens()).logits
    for place, x in values.items():
        assert torch.equal(x, means[place].expand_as(x)), place
    table = model.bigram_table[tokens()]
    expected = model.lm_head(means["final.read"]) + model.final_logits_bias + table
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


def test_means_are_over_real_tokens_of_all_batches():
    model = sparse_model().eval()
    batches = [(tokens(), MASK), (tokens(seed=5), None)]
    with torch.no_grad(), recorded_nodes(model, ["1.mlp.neuron"]) as values:
        found = []
        for ids, mask in batches:
            model(ids, attention_mask=mask)
            real = torch.ones_like(ids) if mask is None else mask
            found += [
                row
                for row, counted in zip(values["1.mlp.neuron"].flatten(0, 1), real.flatten(), strict=True)
                if counted
            ]
    torch.testing.assert_close(
        node_means(model, batches)["1.mlp.neuron"], torch.stack(found).mean(0), rtol=1e-12, atol=0
    )
    with pytest.raises(ValueError, match="text has no tokens"):
        node_means(model, [])


def test_contexts_nest_and_leave_no_hook():
    model = sparse_model().eval()
    with replaced_nodes(model, {"0.attn.q": lambda x: x + 1}), recorded_nodes(model, ["0.attn.q"]) as outer:
        model(tokens())
    with recorded_nodes(model, ["0.attn.q"]) as plain:
        model(tokens())
    assert torch.equal(outer["0.attn.q"], plain["0.attn.q"] + 1)
    with pytest.raises(RuntimeError, match="stop"), replaced_nodes(model, {"0.attn.q": lambda x: x}):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in model.modules())


def test_a_node_s_name_is_read_and_written():
    model = sparse_model()
    for text in ("1.attn.read.11", "final.read.0", "0.mlp.neuron.15"):
        assert str(Node.parse(text, model)) == text
    for wrong in ("1.attn.3", "x.attn.q.1", "final.read", "0.attn.q.-1", "0.mlp.q.1"):
        with pytest.raises(ValueError, match=r"must be LAYER\.PLACE\.INDEX"):
            Node.parse(wrong)
    for missing in ("2.attn.q.0", "0.mlp.neuron.16"):
        with pytest.raises(ValueError, match="is not in the model"):
            Node.parse(missing, model)
