"""A companion model, whose cache follows the leading model's through whatever happens to it."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from bridges.steering.companion import Companion, model_lock
from bridges.steering.model_call import parse_call


def logged(model):
    """The logits of every call of a model, as they come."""
    calls = []
    model.register_forward_hook(lambda _m, _args, output: calls.append(output.logits))
    return calls


@pytest.fixture
def models(tiny):
    return tiny("gpt2", seed=1), tiny("llama", seed=2)


def forward(leading, companion, ids, mask=None, cache=None):
    """One call of the leading model with the companion run before it, as `steer` does."""
    given = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": cache is not None}
    own = companion.run(parse_call(leading, (), given))
    with torch.no_grad():
        output = leading(**given)
    if cache is not None:
        companion.attach_cache(cache, own)
    return output


@pytest.mark.parametrize("padded", [False, True])
def test_token_by_token_it_computes_one_whole_pass(models, tokens, padding, padded):
    leading, other = models
    mask = padding.clone() if padded else torch.ones_like(padding)
    mask[1] = 1  # padding on the right stands between a prompt and what follows it: no cache grows so
    with torch.no_grad():
        whole = other(input_ids=tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    companion, cache, calls = Companion(other), DynamicCache(config=leading.config), logged(other)
    forward(leading, companion, tokens[:, :5], mask[:, :5], cache)
    for column in range(5, 9):
        forward(leading, companion, tokens[:, column : column + 1], mask[:, : column + 1], cache)
    found = torch.cat(calls, 1)
    assert torch.allclose(found[mask.bool()], whole[mask.bool()], atol=1e-5)


def test_what_happens_to_the_leading_cache_happens_to_its_own_cache(models, tokens):
    """Beams are reordered and rows dropped through the leading model's cache alone."""
    leading, other = models
    companion, cache, calls = Companion(other), DynamicCache(config=leading.config), logged(other)
    forward(leading, companion, tokens[:, :5], None, cache)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    forward(leading, companion, tokens[:, 5:6], None, cache)
    with torch.no_grad():
        expected = other(input_ids=torch.cat([tokens[order, :5], tokens[:, 5:6]], 1)).logits[:, -1]
    assert torch.allclose(calls[1][:, -1], expected, atol=1e-5)


def test_without_a_cache_nothing_is_kept(models, tokens):
    leading, other = models
    companion, calls = Companion(other), logged(other)
    for width in (4, 6):
        assert forward(leading, companion, tokens[:, :width]).past_key_values is None
    assert [logits.shape[1] for logits in calls] == [4, 6]


def test_a_cache_of_unseen_tokens_is_refused(models, tokens):
    leading, other = models
    cache = DynamicCache(config=leading.config)
    with torch.no_grad():
        leading(input_ids=tokens[:, :5], past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values holds 5 tokens that were not read inside this steer"):
        forward(leading, Companion(other), tokens[:, 5:], None, cache)


def test_its_layers_leave_every_cache_and_every_copy(models, tokens):
    leading, other = models
    companion, cache = Companion(other), DynamicCache(config=leading.config)
    forward(leading, companion, tokens[:, :5], None, cache)
    keys = [layer.keys for layer in cache.layers[:2]]
    copied = copy.deepcopy(cache)
    cache.reset()
    forward(leading, companion, tokens[:, :4], None, cache)  # starts the companion anew, in place of the one it had
    assert len(cache.layers) == len(copied.layers) == 4
    companion.detach_caches()
    assert len(cache.layers) == len(copied.layers) == 2 and cache.get_seq_length() == 4
    assert all(torch.equal(layer.keys, key) for layer, key in zip(copied.layers, keys, strict=True))
    assert set(vars(cache)) == set(vars(copied)) == set(vars(DynamicCache(config=leading.config)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "inputs_embeds: steer needs input_ids"),
        ({"input_ids": torch.zeros(1, 3).long(), "attention_mask": torch.ones(1, 1, 3, 3)}, r"must be \[batch, seq\]"),
        ({"input_ids": torch.zeros(1, 3).long(), "attention_mask": torch.ones(1, 2)}, "must cover 0 cached and 3 new"),
    ],
)
def test_calls_whose_tokens_are_unknown_are_refused(models, given, message):
    with pytest.raises(ValueError, match=message):
        parse_call(models[0], (), given)


def test_arguments_may_be_positional_or_by_name(models, tokens):
    leading, _ = models
    call = parse_call(leading, (tokens,), {"use_cache": False})
    assert torch.equal(call.input_ids, tokens) and not call.uses_cache and call.n_past == 0 and call.cache is None
    leading.config.use_cache = True
    assert parse_call(leading, (), {"input_ids": tokens}).uses_cache


def test_a_model_has_one_lock_of_its_own():
    one, two = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    assert model_lock(one) is model_lock(one) is not model_lock(two)


def test_a_model_named_by_a_path_of_any_kind_needs_no_lock():
    class Folder:  # not a pathlib.Path
        def __fspath__(self):
            return "folder"

    for name in ("folder", Path("folder"), Folder()):
        with model_lock(name) as lock:
            assert lock is None
