"""torch.compile and steer(): compiled code sees neither the hooks that came after it nor their end."""

import copy

import pytest
import torch
from pairs import gpt2, tokens
from steered import CHANNEL, EDITS, SITE, logits, steered

from bridges.models.modes import uncompiled
from bridges.steering.edits import Edit
from bridges.steering.steer import steer

EVERY_KIND = {
    "constant": (EDITS["add"], {"sparse": None}),
    "positions": (Edit(SITE, CHANNEL, 3.0, "add", -1), {"sparse": None}),
    "sparse": (EDITS["several"], {}),
    "encoder": (EDITS["several"], {"source": "encoder"}),
}


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_by_layer(model):
    for layer in model.transformer.h:
        layer.compile(backend="eager")
    return model


def compiled_layers(model):
    layers = model.transformer.h
    for i, layer in enumerate(layers):
        layers[i] = torch.compile(layer, backend="eager")
    return model


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


WAYS = [compiled, compiled_in_place, compiled_by_layer, compiled_layers, compiled_forward]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("edits", "options"), EVERY_KIND.values(), ids=EVERY_KIND)
@pytest.mark.parametrize("at", ["read", "residual"])
def test_a_compiled_model_is_steered_as_the_plain_one(pair, way, edits, options, at):
    ids, plain = tokens(), logits(pair, tokens())
    options = {"sparse": pair.sparse.model, "at": at} | options
    with steered(pair, edits, **options):
        expected = logits(pair, ids)
    fast = way(copy.deepcopy(pair.dense.model))
    with torch.no_grad():
        assert torch.allclose(fast(ids).logits, plain)  # compiled before steer, without edits
        with steer(fast, pair.bridge_set, edits, **options) as model:
            assert model is fast and torch.allclose(model(ids).logits, expected)
        assert torch.allclose(fast(ids).logits, plain)


@pytest.mark.parametrize(("edits", "options"), EVERY_KIND.values(), ids=EVERY_KIND)
def test_a_model_compiled_inside_keeps_nothing_of_the_edits(pair, edits, options):
    ids, plain = tokens(), logits(pair, tokens())
    with steered(pair, edits, **options), torch.no_grad():
        expected = logits(pair, ids)
        fast = compiled(pair.dense.model)
        assert torch.allclose(fast(ids).logits, expected)
    with torch.no_grad():
        assert torch.allclose(fast(ids).logits, plain)


def test_a_compiled_sparse_model_is_read(pair):
    ids, plain = tokens(), gpt2(width=12, seed=2)
    sparse = compiled(copy.deepcopy(plain))
    with steered(pair, EDITS["set"], sparse=plain):
        expected = logits(pair, ids)
    with torch.no_grad():
        sparse(ids)
    with steered(pair, EDITS["set"], sparse=sparse):
        assert torch.allclose(logits(pair, ids), expected)


def test_generate_that_compiles_is_steered(pair):
    """A static cache makes `generate` compile the model's call."""
    model, ids = pair.dense.model, tokens()
    options = dict(max_new_tokens=3, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True)

    def generated(**how):
        return torch.stack(model.generate(ids, **options, **how).logits)

    from transformers import CompileConfig

    config = CompileConfig(backend="eager", fullgraph=False)
    config._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": config}
    plain = generated()
    torch.testing.assert_close(generated(**static), plain)
    assert hasattr(model, "_compiled_call")
    with steered(pair, EDITS["add"], sparse=None):
        expected = generated()
        torch.testing.assert_close(generated(**static), expected)
    torch.testing.assert_close(generated(**static), plain)
    assert not torch.allclose(plain, expected)


def test_compilation_goes_on_when_the_last_context_is_left_in_any_order():
    runs = []

    def backend(graph, _inputs):
        def run(*args):
            runs.append(None)
            return graph(*args)

        return run

    fast, x = torch.compile(lambda x: x + 1, backend=backend), torch.ones(2)
    fast(x)
    one, two = uncompiled(), uncompiled()
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert torch.equal(fast(x), x + 1) and len(runs) == 1
    two.__exit__(None, None, None)
    assert torch.equal(fast(x), x + 1) and len(runs) == 2
