"""Models whose cache is a state, not a list of tokens: followed where it counts them, refused by name where not."""

import pytest
import torch
from pairs import VOCAB, join, scrambled, sparse_model, tokens, with_units
from steered import gpt2_without_eos, slow_but

from bridges.steering.edits import Edit
from bridges.steering.steer import steer

PROMPT = tokens().clamp(min=1)  # without the padding token, by which `generate` would infer a mask
GREEDY = dict(max_new_tokens=3, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True)

_MODERN = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
_EXPERTS = _MODERN | {
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "experts_implementation": "eager",
    "head_dim": 8,
}
SETTINGS = {
    "mamba": {"hidden_size": 16},
    "falcon_mamba": {"hidden_size": 16, "state_size": 4},
    "mamba2": {"hidden_size": 16, "state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1},
    "rwkv": {"hidden_size": 16, "attention_hidden_size": 16, "intermediate_size": 32, "context_length": 64},
    "minimax": _EXPERTS | {"layer_types": ["linear_attention", "full_attention"], "experts_implementation": "eager"},
    "lfm2": _MODERN | {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": _MODERN
    | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1},
}
REFUSED = slow_but({name: name for name in ("mamba", "falcon_mamba", "mamba2", "rwkv", "minimax")}, "rwkv", "minimax")
NAMED = (
    r"use_cache=True: model='{}' (has no past_key_values|counts 0 tokens in its MiniMaxCache after 7), .* pass use_ca"
)


@pytest.fixture
def stateful(tiny):
    """A random model of a family, in float64."""

    def build(family, seed=0):
        settings = SETTINGS[family] | {"vocab_size": VOCAB, "num_hidden_layers": 2, "eos_token_id": None}
        model = scrambled(tiny(family, seed, **settings), std=0.2)
        model.generation_config.eos_token_id = None
        return model

    return build


def by_hand(model, ids):
    """Logits of greedy decoding where every pass reads the whole row."""
    found = []
    for _ in range(GREEDY["max_new_tokens"]):
        found.append(model(ids, use_cache=False).logits[:, -1])
        ids = torch.cat([ids, found[-1].argmax(-1, keepdim=True)], 1)
    return torch.stack(found).float()  # as generate returns them


def edits_of(pair):
    first = pair.bridge_set.sites[0]
    return {
        "sparse": ([Edit(first, 0, 2.0), Edit("final", 1, 1.0)], "sparse"),
        "encoder": ([Edit(first, 0, 2.0), Edit("final", 1, 1.0)], "encoder"),
        "one site": (Edit(first, 0, 2.0), "encoder"),
        "positions": (Edit(first, 0, 2.0, "add", 3), "sparse"),
    }


@pytest.mark.parametrize("family", REFUSED)
def test_a_cache_that_does_not_count_tokens_is_refused_by_name(family, stateful):
    model = stateful(family)
    pair, ids = with_units(join(model, sparse_model())), PROMPT
    for edits, source in edits_of(pair).values():
        with steer(model, pair.bridge_set, edits, sparse=pair.sparse, source=source), torch.no_grad():
            for call in (lambda: model.generate(ids, **GREEDY), lambda: model(ids, use_cache=True)):
                with pytest.raises(ValueError, match=NAMED.format(family)):
                    call()
            expected = by_hand(model, ids)
            found = torch.stack(model.generate(ids, use_cache=False, **GREEDY).logits)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", [*REFUSED[:3], *REFUSED[4:]])  # rwkv's own cache is wrong
def test_edits_of_one_number_go_with_every_cache(family, stateful):
    model = stateful(family)
    pair, ids = with_units(join(model, sparse_model())), PROMPT
    with steer(model, pair.bridge_set, Edit(pair.bridge_set.sites[0], 0, 2.0, "add")), torch.no_grad():
        expected = by_hand(model, ids)
        found = torch.stack(model.generate(ids, **GREEDY).logits)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # states are kept in float32


@pytest.mark.parametrize("family", slow_but({name: name for name in ("lfm2", "falcon_h1")}, "lfm2"))
def test_a_cache_of_states_and_tokens_is_followed(family, stateful):
    model = stateful(family)
    pair, ids = with_units(join(model, sparse_model())), PROMPT
    for edits, source in edits_of(pair).values():
        with steer(model, pair.bridge_set, edits, sparse=pair.sparse, source=source), torch.no_grad():
            expected = by_hand(model, ids)
            found = torch.stack(model.generate(ids, **GREEDY).logits)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [*REFUSED[1:], "mamba"])
def test_a_companion_with_such_a_cache_is_refused_by_name(family, stateful):
    sparse = stateful(family)
    pair, ids = with_units(join(gpt2_without_eos(), sparse)), PROMPT
    model, edits = pair.dense.model, Edit(pair.bridge_set.sites[0], 0, 2.0)
    with steer(model, pair.bridge_set, edits, sparse=sparse), torch.no_grad():
        for call in (lambda: model.generate(ids, **GREEDY), lambda: model(ids)):
            with pytest.raises(ValueError, match=NAMED.format(family)):
                call()
        expected = by_hand(model, ids)
        found = torch.stack(model.generate(ids, use_cache=False, **GREEDY).logits)
    torch.testing.assert_close(found, expected)


def test_a_companion_that_keeps_states_and_tokens_is_followed(stateful):
    sparse = stateful("lfm2")
    pair, ids = with_units(join(gpt2_without_eos(), sparse)), PROMPT
    model, edits = pair.dense.model, [Edit(pair.bridge_set.sites[0], 0, 2.0), Edit("final", 1, 1.0)]
    with steer(model, pair.bridge_set, edits, sparse=sparse), torch.no_grad():
        expected = by_hand(model, ids)
        beams = model.generate(ids, num_beams=2, use_cache=False, **GREEDY).sequences
        torch.testing.assert_close(torch.stack(model.generate(ids, **GREEDY).logits), expected)
        assert torch.equal(model.generate(ids, num_beams=2, **GREEDY).sequences, beams)


def test_a_cache_that_is_no_cache_is_refused(stateful):
    model = stateful("lfm2")
    pair, ids = with_units(join(model, sparse_model())), PROMPT
    with (
        steer(model, pair.bridge_set, Edit(pair.bridge_set.sites[0], 0, 2.0), sparse=pair.sparse),
        pytest.raises(ValueError, match="past_key_values=tuple must be a Cache of transformers"),
    ):
        model(ids, past_key_values=((torch.zeros(4, 2, 1, 8),) * 2,) * 2)
