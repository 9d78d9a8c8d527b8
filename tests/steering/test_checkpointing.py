"""Gradient checkpointing runs layers again in the backward pass: the gradients are those without it."""

import copy
from functools import partial

import pytest
import torch
from pairs import join, tokens, with_units
from steered import CHANNEL, DENSE, EDITS, SITE, in_turn, sparse_model, steered
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

from bridges.models.loading import as_residual
from bridges.steering.edits import Edit

EVERY_KIND = {
    "constant": (EDITS["add"], {"sparse": None}),
    "constant, several": ([Edit(s, 1, 2.0, "add") for s in ("0.mlp", "1.attn", "final")], {"sparse": None}),
    "positions": (Edit("1.mlp", CHANNEL, 3.0, "add", -1), {"sparse": None}),
    "sparse": (EDITS["several"], {}),
    "encoder": (EDITS["several"], {"source": "encoder"}),
    "encoder, first site": (Edit("0.mlp", CHANNEL, 3.0), {"source": "encoder"}),
}


def gradients(pair, edits, inside, options):
    """Of the loss with respect to every weight; the backward pass inside the context or after it."""
    model, ids = pair.dense.model.train(), tokens()
    model.zero_grad()
    with steered(pair, edits, **options):
        loss = model(ids, labels=ids).loss
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def checkpointing(model, reentrant):
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})


@pytest.mark.parametrize(("kind", "at", "dense"), in_turn(EVERY_KIND, ("read", "residual"), list(DENSE)))
def test_gradients_are_those_without_checkpointing(kind, at, dense):
    edits, options = EVERY_KIND[kind]
    pair, options = with_units(join(DENSE[dense](), sparse_model())), {**options, "at": at}
    for module in pair.dense.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = gradients(pair, edits, True, options)
    for reentrant in (False, True):
        checkpointing(pair.dense.model, reentrant)
        flags = [getattr(m, "gradient_checkpointing", None) for m in pair.dense.model.modules()]
        for inside in (True, False):
            for found, wanted in zip(gradients(pair, edits, inside, options), expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
        assert [getattr(m, "gradient_checkpointing", None) for m in pair.dense.model.modules()] == flags


@pytest.mark.parametrize("at", ["read", "residual"])
def test_a_checkpoint_of_the_users_own_around_the_call_is_refused(pair, at):
    """Its backward pass would run the model without the edits: gradients were off by up to 16 %."""
    model, ids = pair.dense.model.train(), tokens()
    with steered(pair, EDITS["add"], sparse=None, at=at):
        with pytest.raises(ValueError, match=r"inside torch\.utils\.checkpoint.*gradient_checkpointing_enable"):
            checkpoint(lambda i: model(i).logits, ids, use_reentrant=False)
        assert model(ids).logits.requires_grad  # as ever without it
        with torch.autograd.graph.saved_tensors_hooks(partial(torch.clone), lambda t: t):  # the user's own
            assert model(ids).logits.requires_grad
    assert checkpoint(lambda i: model(i).logits, ids, use_reentrant=False).requires_grad


@pytest.mark.parametrize("at", ["read", "residual"])
def test_pytorchs_own_wrapper_for_checkpointing_is_looked_through(pair, at):
    """Its layers are split as the model's own; with gradients they are refused, as a checkpoint of the user's is."""
    model, ids = copy.deepcopy(pair.dense.model).eval(), tokens()
    with steered(pair, EDITS["add"], sparse=None, at=at), torch.no_grad():
        expected = pair.dense.model.eval()(ids).logits
    block = type(pair.dense.layers[0])
    wrap = partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=lambda m: isinstance(m, block))
    wrapped = pair._replace(dense=as_residual(model))
    assert wrapped.dense.sites == pair.dense.sites
    with steered(wrapped, EDITS["add"], sparse=None, at=at):
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected)
        with pytest.raises(ValueError, match=r"inside torch\.utils\.checkpoint"):
            model(ids)


def test_layers_without_an_edit_stay_checkpointed(pair):
    """Steering costs the memory of the edited layers alone."""
    model, ids, runs = pair.dense.model.train(), tokens(), [0, 0]

    def count(i):
        def counted(*_):
            runs[i] += 1

        return counted

    checkpointing(model, False)
    for i, layer in enumerate(model.transformer.h):
        layer.attn.register_forward_pre_hook(count(i))
    with steered(pair, Edit(SITE, CHANNEL, 3.0, "add"), sparse=None):
        runs[:] = [0, 0]
        model(ids, labels=ids).loss.backward()
    assert runs == [2, 1]


def test_a_part_called_alone_is_refused(pair):
    """Its layers would run again without the edits, unless the whole model's call prevents it."""
    model, ids = pair.dense.model.train(), tokens()
    checkpointing(model, False)
    with steered(pair, EDITS["add"], sparse=None), pytest.raises(ValueError, match="gradient checkpointing on"):
        model.transformer(ids)
    model.eval()
    with steered(pair, EDITS["add"], sparse=None):
        model.transformer(ids)


def test_the_models_own_cache_is_left_out_while_layers_are_checkpointed(pair):
    model, ids = pair.dense.model.train(), tokens()
    checkpointing(model, False)
    with steered(pair, EDITS["several"]):
        found = model(ids, use_cache=True)
        assert found.past_key_values is None or found.past_key_values.get_seq_length() == 0
        found.logits.sum().backward()


def test_a_chain_of_sublayers_has_its_own_gradients(pair):
    """A half of a layer has something replaced, which is back in place when the backward pass runs."""
    model, ids = pair.dense.model, tokens()
    plain, stream = copy.deepcopy(model).eval(), pair.dense.residuals(ids)[0][1].detach()

    def found(dense):
        leaf = stream.clone().requires_grad_()
        dense.run_from("0.mlp", leaf, ids).square().sum().backward()
        return leaf.grad, [p.grad for p in dense.layers[0].parameters()]

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = found(type(pair.dense)(plain))
    for reentrant in (False, True):
        checkpointing(model, reentrant)
        model.train().zero_grad()
        torch.testing.assert_close(found(pair.dense), expected)
