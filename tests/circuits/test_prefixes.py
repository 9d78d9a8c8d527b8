"""Passes that compute every prefix once, and live nodes alone, against the model's own, in values and gradients."""

import pytest
import torch
from pairs import sparse_model

from bridges.circuits.live import MAX_LIVE, MaskedPass
from bridges.circuits.masks import Masks, ablated
from bridges.circuits.nodes import node_means, place_sizes, recorded_nodes
from bridges.circuits.prefixes import Prefixes, last_logits

IDS = torch.tensor(
    [
        [5, 6, 7, 8, 9, 5],
        [5, 6, 7, 3, 9, 5],  # begins as the first
        [5, 6, 7, 8, 9, 4],
        [0, 0, 0, 5, 6, 7],  # a prefix of the first
        [0, 0, 6, 6, 6, 6],
        [0, 0, 0, 5, 6, 7],
    ]
)
MASK = (IDS != 0).long()
VARIANTS = {
    "plain": {},
    "one layer": {"layers": 1},
    "three layers": {"layers": 3},
    "concatenated positions": {"d_pos_emb": 3},
    "no sink, no bigrams, relu": {"sink": False, "enable_bigram_table": False, "residual_activation_type": "relu"},
    "layer norms": {"rms_norm": False},
    "residual AbsTopK": {"afrac_loctypes": "attn_in,attn_q,resid_post_attn,resid_post_mlp,mlp_neuron"},
}


def plain_logits(model):
    return model(IDS, attention_mask=MASK, use_cache=False, logits_to_keep=1).logits[:, -1]


def logits_and_gradients(logits, weights, masks):
    """The logits, and the gradients of their weighted sum with respect to the masks' parameters."""
    parameters = list(masks.parameters.values())
    return logits, torch.autograd.grad((weights * logits).sum(), parameters, allow_unused=True, materialize_grads=True)


def masks_of(model, share_on=0.6):
    """Masks of which a share is on, drawn at random."""
    everything = {place: torch.ones(size, dtype=torch.bool) for place, size in place_sizes(model).items()}
    generator = torch.Generator().manual_seed(1)
    masks = Masks(node_means(model, [(IDS, MASK)]), everything, generator)
    with torch.no_grad():
        for parameter in masks.parameters.values():
            parameter[torch.rand(len(parameter), generator=generator) > share_on] *= -1
    return masks


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request):
    return sparse_model(**request.param).eval().requires_grad_(False)


@pytest.mark.parametrize("share_on", [0.0, 0.15, 0.6, 1.0])
def test_logits_and_gradients_of_masks_are_those_of_the_plain_pass(model, share_on):
    masks, prefixes = masks_of(model, share_on), Prefixes.of(IDS, MASK)
    weights = torch.randn(len(IDS), model.config.vocab_size, generator=torch.Generator().manual_seed(2)).double()
    found = []
    for logits_of in (plain_logits, lambda model: last_logits(model, prefixes)):
        with masks.applied(model):
            logits = logits_of(model)
        found.append(logits_and_gradients(logits, weights, masks))
    found.append(logits_and_gradients(MaskedPass(model).live_logits(prefixes, masks), weights, masks))
    for logits, gradients in found[1:]:
        torch.testing.assert_close(logits, found[0][0], rtol=1e-10, atol=1e-12)
        for place, expected, gradient in zip(masks.parameters, found[0][1], gradients, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-11, msg=place)
    if share_on:
        assert max(gradient.abs().max() for gradient in found[0][1]) > 1e-3


def test_a_circuit_has_the_same_logits_by_either_pass():
    model = sparse_model().eval().requires_grad_(False)
    generator, prefixes = torch.Generator().manual_seed(3), Prefixes.of(IDS, MASK)
    on = {place: torch.rand(size, generator=generator) > 0.7 for place, size in place_sizes(model).items()}
    means = node_means(model, [(IDS, MASK)])
    with torch.no_grad():
        with ablated(model, on, means):
            expected = plain_logits(model)
        masks = Masks.fixed(means, on)
        torch.testing.assert_close(MaskedPass(model).live_logits(prefixes, masks), expected)
        torch.testing.assert_close(MaskedPass(model).logits(prefixes, masks), expected)


def test_the_live_pass_is_taken_once_few_masks_are_on(monkeypatch):
    model = sparse_model().eval().requires_grad_(False)
    sizes, prefixes, taken = place_sizes(model), Prefixes.of(IDS, MASK), []
    most = int(sum(sizes.values()) * MAX_LIVE)

    def live_logits(self, *args):
        taken.append(True)
        return torch.zeros(len(IDS), model.config.vocab_size)

    monkeypatch.setattr(MaskedPass, "live_logits", live_logits)
    for n_on in (most, most + 1):
        on = {place: torch.zeros(size, dtype=torch.bool) for place, size in sizes.items()}
        on["1.mlp.neuron"][:n_on] = True
        MaskedPass(model).logits(prefixes, Masks.fixed(node_means(model, [(IDS, MASK)]), on))
        assert len(taken) == 1 <= most < sizes["1.mlp.neuron"]


def test_embeddings_that_hold_positions_are_told_apart():
    model = sparse_model().eval()
    with torch.no_grad():
        model.transformer.wpe.weight.copy_(torch.randn(model.transformer.wpe.weight.shape))
        torch.testing.assert_close(last_logits(model, Prefixes.of(IDS, MASK)), plain_logits(model))


def test_a_circuit_of_every_node_is_the_whole_model_bit_for_bit(model):
    on = {place: torch.ones(size, dtype=torch.bool) for place, size in place_sizes(model).items()}
    prefixes = Prefixes.of(IDS, MASK)
    with torch.no_grad():
        whole = last_logits(model, prefixes)
        with ablated(model, on, node_means(model, [(IDS, MASK)])):
            assert torch.equal(last_logits(model, prefixes), whole)


def test_rows_are_distinct_tokens_then_prefixes_and_in_the_last_layer_prompts():
    model = sparse_model().eval()
    with torch.no_grad(), recorded_nodes(model) as values:
        last_logits(model, Prefixes.of(IDS, MASK))
    rows = {place: x.shape[:2] for place, x in values.items()}
    real = [ids[mask.bool()].tolist() for ids, mask in zip(IDS, MASK, strict=True)]
    tokens = {token for ids in real for token in ids}
    prefixes = {tuple(ids[:i]) for ids in real for i in range(1, len(ids) + 1)}
    assert len(prefixes) < int(MASK.sum())
    for kind in ("attn.read", "attn.q", "attn.k", "attn.v"):
        assert rows[f"0.{kind}"] == (1, len(tokens))
    for place in ("0.attn.write", "0.mlp.read", "0.mlp.neuron", "0.mlp.write", "1.attn.read", "1.attn.k", "1.attn.v"):
        assert rows[place] == (1, len(prefixes))
    for place in ("1.attn.q", "1.attn.write", "1.mlp.read", "1.mlp.neuron", "1.mlp.write", "final.read"):
        assert rows[place] == (1, len(IDS))


def test_some_of_the_prompts_have_no_column_of_padding_alone():
    prefixes, rows = Prefixes.of(IDS, MASK), torch.tensor([4, 3])
    assert prefixes.take(rows).numbers.shape == (2, 4)
    model = sparse_model().eval()
    with torch.no_grad():
        torch.testing.assert_close(last_logits(model, prefixes.take(rows)), plain_logits(model)[rows])


def test_prompts_that_begin_alike_share_the_numbers_of_their_prefixes_padding_or_not():
    numbers = Prefixes.of(IDS, MASK).numbers
    assert numbers[0, :3].tolist() == numbers[1, :3].tolist() == numbers[3, 3:].tolist() == numbers[5, 3:].tolist()
    assert numbers[0, 3] != numbers[1, 3] and numbers[0, 4] != numbers[1, 4]  # the same token after others
    assert (numbers[MASK == 0] == -1).all() and len(numbers[MASK == 1].unique()) == int(numbers.max()) + 1
