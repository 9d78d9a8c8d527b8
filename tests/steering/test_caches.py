"""Caches inside steer(): those that a companion follows, those that it cannot, and what is left of it after."""

import copy

import pytest
import torch
from pairs import tokens
from steered import CHANNEL, EDITS, SITE, logits, steered
from transformers import DynamicCache

from bridges.steering.edits import Edit


@pytest.mark.parametrize("source", ["sparse", "encoder"])
def test_a_cache_that_the_model_makes_is_followed(pair, source):
    ids, edits = tokens(), EDITS["several"]
    with torch.no_grad(), steered(pair, edits, source=source):
        whole = pair.dense.model(ids, use_cache=False).logits
        first = pair.dense.model(ids[:, :3], use_cache=True)
        rest = [pair.dense.model(ids[:, 3:5], past_key_values=first.past_key_values)]
        rest.append(pair.dense.model(ids[:, 5:], past_key_values=rest[0].past_key_values))
        given = DynamicCache(config=pair.dense.model.config)
        again = [pair.dense.model(part, past_key_values=given, use_cache=True).logits for part in ids.split(4, dim=1)]
    for parts in ([first.logits, *(r.logits for r in rest)], again):
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-10)


def test_an_empty_cache_of_the_users_own_is_followed(pair):
    """One without layers yet gets the dense model's own first."""
    ids, edits = tokens(), EDITS["several"]
    with steered(pair, edits), torch.no_grad():
        cache = DynamicCache()
        found = [pair.dense.model(ids[:, :5], past_key_values=cache).logits]
        found += [pair.dense.model(ids[:, 5:], past_key_values=cache).logits]
    with steered(pair, edits):
        assert torch.allclose(torch.cat(found, 1), logits(pair, ids), atol=1e-12)


def test_a_cache_in_a_tuple_is_followed(pair):
    ids, edits = tokens(), EDITS["several"]
    with steered(pair, edits), torch.no_grad():
        first, cache = pair.dense.model(ids[:, :5], return_dict=False, use_cache=True)[:2]
        second = pair.dense.model(ids[:, 5:], past_key_values=cache, return_dict=False)[0]
    with steered(pair, edits):
        assert torch.allclose(torch.cat([first, second], 1), logits(pair, ids), atol=1e-12)


def test_a_cache_filled_outside_is_refused(pair):
    ids = tokens()
    with torch.no_grad():
        outside = pair.dense.model(ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 4 tokens that were not read inside"), steered(pair, EDITS["set"]):
        pair.dense.model(ids[:, 4:], past_key_values=outside)


def test_a_static_cache_is_refused_but_for_constant_edits(pair):
    ids = tokens()
    options = dict(max_new_tokens=3, do_sample=False, pad_token_id=0, cache_implementation="static")
    for edits in (EDITS["several"], Edit(SITE, 1, 1.0, "add", -1)):
        with (
            steered(pair, edits),
            pytest.raises(ValueError, match="past_key_values: steer cannot follow the tokens in a static cache"),
        ):
            pair.dense.model.generate(ids, **options)
    found = []
    for chosen in ("static", "dynamic"):
        with steered(pair, EDITS["add"], sparse=None):
            found.append(pair.dense.model.generate(ids, **{**options, "cache_implementation": chosen}))
    assert torch.equal(*found)


# After the context.

FOLLOWED = {
    "sparse": (EDITS["several"], {"source": "sparse"}),
    "encoder": (EDITS["several"], {"source": "encoder"}),
    "first site, encoder": (EDITS["scale"], {"source": "encoder", "at": "residual"}),
    "positions": (Edit(SITE, CHANNEL, 5.0, "add", -1), {}),
    "constant": (EDITS["add"], {"sparse": None}),
}


def copied_by_hand(cache, model):
    """A cache of the model with the tensors of its own layers in another one."""
    fresh = DynamicCache(config=model.config)
    for i in range(model.config.n_layer):
        fresh.update(cache.layers[i].keys.clone(), cache.layers[i].values.clone(), i)
    return fresh


def continued(model, cache, token):
    """Five steps of greedy decoding: the logits of each."""
    found = []
    with torch.no_grad():
        for _ in range(5):
            found.append(model(token, past_key_values=cache).logits[:, -1])
            token = found[-1].argmax(-1, keepdim=True)
    return torch.stack(found)


@pytest.mark.parametrize(("edits", "options"), FOLLOWED.values(), ids=FOLLOWED)
@pytest.mark.parametrize("way_out", ["end", "error"])
def test_a_cache_that_outlives_the_context_is_the_models_own(pair, edits, options, way_out):
    """The layers of the model alone, with what it computed; a continuation outside is an unsteered one."""
    model, ids, cache = pair.dense.model, tokens(width=5), DynamicCache(config=pair.dense.model.config)
    try:
        with steered(pair, edits, **options), torch.no_grad():
            made = model(ids, use_cache=True).past_key_values
            model(ids, past_key_values=cache)
            branch = copy.deepcopy(cache)
            expected = copied_by_hand(cache, model)
            if way_out == "error":
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    expected = continued(model, expected, ids[:, :1])
    assert not torch.allclose(expected, continued(model, model(ids).past_key_values, ids[:, :1]))
    for one in (cache, made, branch):
        assert len(one.layers) == model.config.n_layer and one.get_seq_length() == 5
        assert set(vars(one)) == set(vars(DynamicCache(config=model.config)))
        assert torch.equal(continued(model, one, ids[:, :1]), expected)


def test_a_cache_is_its_models_own_whatever_order_nested_contexts_are_left_in(pair):
    model, ids = pair.dense.model, tokens(width=5)
    first, second = (steered(pair, EDITS[name]) for name in ("set", "several"))
    first.__enter__()
    second.__enter__()
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        first.__exit__(None, None, None)
        model(ids[:, :1], past_key_values=cache)  # the inner one goes on
    second.__exit__(None, None, None)
    assert len(cache.layers) == model.config.n_layer and cache.get_seq_length() == 6


def test_a_cache_that_went_on_outside_is_refused_inside_again(pair):
    model, ids = pair.dense.model, tokens()
    with torch.no_grad():
        with steered(pair, EDITS["several"]):
            cache = model(ids[:, :4], use_cache=True).past_key_values
        for columns in (slice(4, 5), slice(5, 6)):
            refused = pytest.raises(ValueError, match=r"past_key_values holds \d tokens that were not read inside")
            with refused, steered(pair, EDITS["several"]):
                model(ids[:, columns], past_key_values=cache)
            model(ids[:, columns], past_key_values=cache)


def test_branches_of_a_copied_cache_are_followed(pair):
    """The recipe of a prefix that several prompts share."""
    model, edits, prefix, ends = pair.dense.model, EDITS["several"], tokens(width=4), tokens(width=3, seed=8).split(1)
    with torch.no_grad(), steered(pair, edits):
        shared = model(prefix[:1], use_cache=True).past_key_values
        for end in ends:
            found = model(end, past_key_values=copy.deepcopy(shared)).logits
            whole = logits(pair, torch.cat([prefix[:1], end], 1))
            assert torch.allclose(found, whole[:, 4:], atol=1e-10)
