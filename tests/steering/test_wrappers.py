"""Wrappers of the dense model (PEFT's, a user's own): their calls and their `generate` reach the edits."""

import copy

import peft
import pytest
import torch
from pairs import join, sparse_model, tokens, with_units
from steered import CHANNEL, EDITS, SITE, llama, steered
from torch import nn

from bridges.steering.edits import Edit
from bridges.steering.steer import steer

GREEDY = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True)


class Delegating(nn.Module):
    """`generate` of a wrapper calls the model inside, not the wrapper."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def generate(self, *args, **kwargs):
        return self.model.generate(*args, **kwargs)


def lora(model):
    """Adapters that change the model."""
    torch.manual_seed(5)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


@pytest.fixture
def pair():
    return with_units(join(llama(), sparse_model()))


EVERY_KIND = {
    "constant": (EDITS["add"], {"sparse": None}),
    "positions": (Edit(SITE, CHANNEL, 3.0, "add", -1), {"sparse": None}),
    "sparse": (EDITS["several"], {}),
    "encoder": (EDITS["several"], {"source": "encoder"}),
}


@pytest.mark.parametrize("wrap", [lora, Delegating], ids=["PEFT", "user's"])
@pytest.mark.parametrize(("edits", "options"), EVERY_KIND.values(), ids=EVERY_KIND)
def test_a_wrappers_calls_are_those_of_the_plain_model(pair, wrap, edits, options):
    """The oracle is the model with the adapters merged into its weights, in which nothing is wrapped."""
    ids = tokens()
    wrapped = wrap(pair.dense.model)
    plain = copy.deepcopy(wrapped).merge_and_unload() if wrap is lora else copy.deepcopy(wrapped.model)
    options = {"sparse": pair.sparse.model, **options}
    with steer(plain, pair.bridge_set, edits, **options) as model, torch.no_grad():
        expected, expected_logits = model.generate(ids, **GREEDY), model(ids).logits
    for given in (wrapped, pair.dense.model):
        with steer(given, pair.bridge_set, edits, **options) as model, torch.no_grad():
            assert model is given
            for _ in range(2):  # a call in between must leave nothing that generate would take for its own
                found = wrapped.generate(input_ids=ids, **GREEDY)
                torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits))
                assert torch.equal(found.sequences, expected.sequences)
                torch.testing.assert_close(wrapped(ids).logits, expected_logits)
                wrapped(ids.flip(1))
    with torch.no_grad():
        assert not torch.allclose(wrapped(ids).logits, expected_logits)


def test_contexts_of_a_wrapper_and_of_the_model_inside_nest(pair):
    ids, edits, wrapped = tokens(), EDITS["several"], Delegating(pair.dense.model)
    options = {"source": "encoder", "sparse": None}
    with steer(wrapped, pair.bridge_set, edits, **options), torch.no_grad():
        expected = wrapped(ids).logits
    with steer(wrapped, pair.bridge_set, edits[:2], **options), steered(pair, edits[2:], **options), torch.no_grad():
        torch.testing.assert_close(wrapped(ids).logits, expected)


def test_a_wrapped_sparse_model_is_read(pair):
    ids = tokens()
    with steered(pair, EDITS["set"]), torch.no_grad():
        expected = pair.dense.model(ids).logits
    with steered(pair, EDITS["set"], sparse=Delegating(pair.sparse.model)), torch.no_grad():
        assert torch.equal(pair.dense.model(ids).logits, expected)


# Prefix tuning: a cache of virtual tokens before every row.


@pytest.fixture
def prefixed(pair):
    torch.manual_seed(6)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    wrapped = peft.get_peft_model(pair.dense.model.float(), config).eval()
    for parameter in wrapped.prompt_encoder.parameters():
        nn.init.normal_(parameter)
    return wrapped


def test_virtual_tokens_go_with_edits_of_one_number(pair, prefixed):
    """The oracle adds the vector with a hook of its own to what the edited layer's attention reads."""
    ids, edit = tokens(), Edit(SITE, CHANNEL, 4.0, "add")
    with torch.no_grad():
        plain = prefixed(ids).logits
        with steered(pair, edit, sparse=None, at="residual"):
            found = prefixed(ids).logits
            text = prefixed.generate(input_ids=ids, **GREEDY)
        added = 4.0 * pair.bridge_set[SITE].read_columns([CHANNEL])[0].float()
        layer = pair.dense.model.model.layers[1]
        handle = layer.register_forward_pre_hook(lambda _, args: (args[0] + added, *args[1:]))
        torch.testing.assert_close(found, prefixed(ids).logits)
        torch.testing.assert_close(
            torch.stack(text.logits), torch.stack(prefixed.generate(input_ids=ids, **GREEDY).logits)
        )
        handle.remove()
    assert not torch.allclose(found, plain)


REFUSED = {
    "first token": (Edit(SITE, CHANNEL, 4.0, "add", 0), r"positions=\(0,\) count a row's tokens, but past_key_values"),
    "last token": (Edit(SITE, CHANNEL, 4.0, "add", -1), r"positions=\(-1,\) count from the prompt's end, but past_key"),
    "per token": (Edit(SITE, CHANNEL, torch.ones(4, 7), "add"), "value has a number per prompt token, but past_key"),
    "reading": (Edit(SITE, CHANNEL, 4.0), "past_key_values holds 3 tokens that were not read inside this steer"),
}


@pytest.mark.parametrize(("edit", "message"), REFUSED.values(), ids=REFUSED)
def test_virtual_tokens_are_refused_where_an_edit_counts_or_reads_tokens(pair, prefixed, edit, message):
    ids, sparse = tokens(), pair.sparse.model.float()
    for call in (lambda: prefixed(ids), lambda: prefixed.generate(input_ids=ids, **GREEDY)):
        with steered(pair, edit, sparse=sparse), torch.no_grad(), pytest.raises(ValueError, match=message):
            call()


def test_a_model_with_virtual_tokens_is_refused_as_a_whole(pair, prefixed):
    with (
        pytest.raises(ValueError, match=r"model=PeftModelForCausalLM puts 3 virtual tokens before every row"),
        steer(prefixed, pair.bridge_set, EDITS["add"]),
    ):
        pass
