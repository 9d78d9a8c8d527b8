"""A model beside another, whose cache follows the other's through whatever happens to it."""

import pytest
import torch
from transformers import DynamicCache

from bridges.steering.companion import Shadow, leading_pass


def logged(model):
    """The logits of every call of a model, as they come."""
    calls = []
    model.register_forward_hook(lambda _m, _args, output: calls.append(output.logits))
    return calls


@pytest.fixture
def models(tiny):
    return tiny("gpt2", seed=1), tiny("llama", seed=2)


def forward(leading, shadow, ids, mask=None, cache=None):
    """One call of the leading model with the shadow run before it, as `steer` does."""
    given = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": cache is not None}
    shadow.run(leading_pass(leading, (), given))
    with torch.no_grad():
        return leading(**given)


@pytest.mark.parametrize("padded", [False, True])
def test_token_by_token_it_is_one_whole_pass(models, tokens, padding, padded):
    leading, beside = models
    mask = padding.clone() if padded else torch.ones_like(padding)
    mask[1] = 1  # padding on the right stands between a prompt and what follows it: no cache grows so
    with torch.no_grad():
        whole = beside(input_ids=tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    shadow, cache, calls = Shadow(beside), DynamicCache(config=leading.config), logged(beside)
    forward(leading, shadow, tokens[:, :5], mask[:, :5], cache)
    for column in range(5, 9):
        forward(leading, shadow, tokens[:, column : column + 1], mask[:, : column + 1], cache)
    found = torch.cat(calls, 1)
    assert torch.allclose(found[mask.bool()], whole[mask.bool()], atol=1e-5)


def test_what_happens_to_the_leading_cache_happens_to_its_own(models, tokens):
    """Beams are reordered and rows dropped through the leading model's cache alone."""
    leading, beside = models
    shadow, cache, calls = Shadow(beside), DynamicCache(config=leading.config), logged(beside)
    forward(leading, shadow, tokens[:, :5], None, cache)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    forward(leading, shadow, tokens[:, 5:6], None, cache)
    with torch.no_grad():
        expected = beside(input_ids=torch.cat([tokens[order, :5], tokens[:, 5:6]], 1)).logits[:, -1]
    assert torch.allclose(calls[1][:, -1], expected, atol=1e-5)


def test_without_a_cache_nothing_is_kept(models, tokens):
    leading, beside = models
    shadow, calls = Shadow(beside), logged(beside)
    for width in (4, 6):
        forward(leading, shadow, tokens[:, :width])
    assert [logits.shape[1] for logits in calls] == [4, 6] and shadow._latest is None


def test_a_cache_of_unseen_tokens_is_refused(models, tokens):
    leading, beside = models
    cache = DynamicCache(config=leading.config)
    with torch.no_grad():
        leading(input_ids=tokens[:, :5], past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values holds 5 tokens that were not read inside this steer"):
        forward(leading, Shadow(beside), tokens[:, 5:], None, cache)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "inputs_embeds: steer needs input_ids"),
        ({"input_ids": torch.zeros(1, 3).long(), "attention_mask": torch.ones(1, 1, 3, 3)}, r"must be \[batch, seq\]"),
        ({"input_ids": torch.zeros(1, 3).long(), "attention_mask": torch.ones(1, 2)}, "must cover 0 cached and 3 new"),
    ],
)
def test_calls_that_cannot_be_followed_are_refused(models, given, message):
    with pytest.raises(ValueError, match=message):
        leading_pass(models[0], (), given)


def test_a_call_is_read_by_place_and_by_name(models, tokens):
    leading, _ = models
    call = leading_pass(leading, (tokens,), {"use_cache": False})
    assert torch.equal(call.input_ids, tokens) and not call.cached and call.past == 0 and call.cache is None
    leading.config.use_cache = True
    assert leading_pass(leading, (), {"input_ids": tokens}).cached
