"""Which sparse channels a model's prediction depends on, on a model whose answer is known."""

import torch
from pairs import gpt2, join, sparse_model, tokens
from planted import planted_model, planted_pairs

from bridges.bridge import Bridge, BridgeSet
from bridges.fitting.channel_effects import FLOOR, _draws, decoder_freedoms
from bridges.models.loading import as_residual
from bridges.objective.pair import ModelPair


def pair_with(sparse):
    dense = as_residual(sparse_model(layers=1, width=8, vocab_size=12, block_size=16))
    model = as_residual(sparse)
    names = [str(site) for site in model.sites]
    bridge_set = BridgeSet([(n, n) for n in names], [Bridge(8, model.d_model, 4, torch.float64) for _ in names])
    return ModelPair(dense, model, bridge_set)


def test_only_channels_that_the_answer_depends_on_have_weight():
    """At the last site the planted model reads channel 1 for its answer, and others only as noise."""
    pair = pair_with(planted_model(noise=0.0))
    weights = decoder_freedoms(pair, [(planted_pairs().input_ids, None)])
    last = weights[-1]
    assert last.argmax() == 1
    others = [channel for channel in range(16) if channel != 1]
    # The norm before the unembedding makes the answer depend a little on every channel's size.
    assert last[1] > 1.5 * last[others].max()
    assert abs(last.mean().item() - 1) < 1e-12
    assert (last > 0).all()


def test_the_effect_is_that_of_the_definition_over_all_tokens():
    pair = join(gpt2(), sparse_model())
    ids = tokens(6, 7)
    whole = decoder_freedoms(pair, [(ids, None)])
    expected = by_hand(pair, ids)
    for one, other in zip(whole, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_batches_and_their_order_do_not_matter():
    """So two processes give what one gives."""
    pair, ids = join(gpt2(), sparse_model()), tokens(6, 7)
    whole = decoder_freedoms(pair, [(ids, None)], seed=3)
    parts = decoder_freedoms(pair, [(ids[4:], None), (ids[:4], None)], seed=3)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(whole[0], decoder_freedoms(pair, [(ids, None)], seed=4)[0])


def by_hand(pair, ids):
    uniform, signs = _draws(ids, 0)
    trace = pair.sparse.trace(ids, differentiable=True)
    log_p = trace.logits.log_softmax(-1)
    total = 0.0
    for row in range(ids.shape[0]):
        for place in range(1, ids.shape[1]):  # the first token of a row counts nowhere
            cumulated = log_p[row, place].exp().cumsum(-1)
            token = next(i for i, c in enumerate(cumulated.tolist()) if c >= uniform[row, place].item())
            total = total + signs[row, place] * log_p[row, place, token]
    found = []
    streams = [trace.residuals[pair.site("sparse", i)] for i in range(len(pair.bridge_set))]
    for z, g in zip(streams, torch.autograd.grad(total, streams), strict=True):
        z, g = z[:, 1:].flatten(0, 1).detach(), g[:, 1:].flatten(0, 1)
        effect = ((z - z.mean(0)) * g).square().mean(0).sqrt()
        weights = (effect / effect.mean()).clamp(min=FLOOR).sqrt()
        found.append(weights / weights.mean())
    return found
