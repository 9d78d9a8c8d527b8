"""What the prompt of a call is, and where positions and values per token fall."""

import pytest
import torch
from pairs import join, sparse_model, tokens, with_units
from steered import CHANNEL, LEFT, SITE, gpt2_without_eos, in_turn, logits, steered
from transformers import DynamicCache

from bridges.models.huggingface.recording import model_inputs
from bridges.steering.counterfactual import counterfactual
from bridges.steering.edits import Edit


def test_positions_count_real_tokens_from_either_end(pair):
    ids = tokens()
    rows = {0: [0, 2, 1, 0], -1: [6, 6, 6, 6], 2: [2, 4, 3, 2], -4: [3, 3, 3, 3]}
    plain = logits(pair, ids, LEFT)
    for position, expected in rows.items():
        with steered(pair, Edit("final", 1, 2.0, "add", position), at="residual"):
            changed = (logits(pair, ids, LEFT) != plain).any(-1) & LEFT.bool()
        assert changed.int().argmax(1).tolist() == expected and (changed.sum(1) == 1).all()
    right = LEFT.flip(1)
    with steered(pair, Edit("final", 1, 2.0, "add", [-1, 0, 99, -99]), at="residual"):
        changed = (logits(pair, ids, right) != logits_outside(pair, ids, right)).any(-1) & right.bool()
    assert changed.nonzero().tolist() == [[0, 0], [0, 6], [1, 0], [1, 4], [2, 0], [2, 5], [3, 0], [3, 6]]


def logits_outside(pair, ids, mask):
    inputs = model_inputs(pair.dense.model, ids, mask)
    with torch.no_grad():
        return with_units(join(gpt2_without_eos(), sparse_model())).dense.model(**inputs).logits


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("position", [-2, 3])
def test_an_edit_at_a_prompt_position_acts_on_the_prompt_alone(pair, position, use_cache):
    """The first new token of an edit at the last layer's stream is the last one that differs."""
    ids = tokens()
    options = dict(max_new_tokens=4, do_sample=False, use_cache=use_cache, pad_token_id=0, output_logits=True)
    options |= {"return_dict_in_generate": True}
    with steered(pair, Edit("final", 1, 5.0, "add", position), at="residual"):
        found = pair.dense.model.generate(ids, **options)
    plain = pair.dense.model.generate(ids, **options)
    assert torch.equal(found.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, plain.logits, strict=True))
    with steered(pair, Edit("final", 1, 5.0, "add", -1), at="residual"):
        found = pair.dense.model.generate(ids, **options)
    assert not torch.equal(found.logits[0], plain.logits[0])


def test_a_longer_prompt_after_a_shorter_one_is_a_new_prompt(pair):
    ids, edit = tokens(), Edit(SITE, CHANNEL, 5.0, "add", -1)
    with steered(pair, edit):
        expected = logits(pair, ids)
    with steered(pair, edit):
        logits(pair, ids[:, :4])
        assert torch.equal(logits(pair, ids), expected)


def test_positions_from_the_end_of_a_prompt_that_began_outside_are_refused(pair):
    ids, cache = tokens(), DynamicCache(config=pair.dense.model.config)
    refused = pytest.raises(ValueError, match=r"positions=\(0, -1\) count from the prompt's end, but past_key_values")
    with torch.no_grad():
        pair.dense.model(ids[:, :5], past_key_values=cache)
        with steered(pair, Edit(SITE, CHANNEL, 5.0, "add", (0, -1))), refused:
            pair.dense.model(ids[:, 5:], past_key_values=cache)


def test_a_second_turn_has_its_own_prompt_and_a_cache_from_outside_none(pair):
    ids, model, edit = tokens(rows=1), pair.dense.model, Edit("final", CHANNEL, 4.0, "set", (-1,))
    how = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    how |= {"return_dict_in_generate": True}
    cache = DynamicCache(config=model.config)
    with steered(pair, edit, at="residual"):
        expected = model.generate(ids, **how).logits[0]
        model.generate(ids[:, :4], past_key_values=cache, **how)
        torch.testing.assert_close(model.generate(ids, past_key_values=cache, **how).logits[0], expected)
    outside = DynamicCache(config=model.config)
    model.generate(ids[:, :4], past_key_values=outside, **how)
    with (
        steered(pair, edit),
        pytest.raises(ValueError, match="count from the prompt's end, but past_key_values holds 4"),
    ):
        model.generate(ids, past_key_values=outside, **how)


def test_a_call_after_generate_is_a_prompt_of_its_own(pair):
    ids, edit = tokens(), Edit(SITE, CHANNEL, 4.0, "set", (-1,))
    with torch.no_grad(), steered(pair, edit):
        expected = pair.dense.model(ids[:, :6], use_cache=False).logits
        pair.dense.model(ids[:, :5], use_cache=False)
        pair.dense.model.generate(ids[:, :3], max_new_tokens=1, pad_token_id=0)
        assert torch.equal(pair.dense.model(ids[:, :6], use_cache=False).logits, expected)


def test_two_caches_may_grow_in_turns(pair):
    model, edit = pair.dense.model, Edit(SITE, CHANNEL, 4.0, "set", (-1,))
    prompts, more, found = [tokens()[:, :3], tokens()], tokens(width=4, seed=6), {}

    def run(turns):
        caches = [DynamicCache(config=model.config) for _ in prompts]
        with torch.no_grad(), steered(pair, edit):
            for i, ids in turns:
                found.setdefault(i, []).append(model(ids, past_key_values=caches[i]).logits)

    steps = [[(i, ids), *((i, more[:, t : t + 1]) for t in range(4))] for i, ids in enumerate(prompts)]
    run(steps[0] + steps[1])
    run([turn for both in zip(*steps, strict=True) for turn in both])
    for logits_found in found.values():
        for one, two in zip(logits_found[:5], logits_found[5:], strict=True):
            assert torch.equal(one, two)


def test_a_value_of_an_unpadded_prompt_is_refused_on_a_padded_one(pair):
    edit = Edit(SITE, CHANNEL, torch.ones(4, 5), "add")
    with steered(pair, edit), pytest.raises(ValueError, match=r"value=\(4, 5\) is shorter than the prompts, \(4, 7\)"):
        logits(pair, tokens(), LEFT)
    with steered(pair, edit):
        logits(pair, tokens())


@pytest.mark.parametrize("edit", ["from the end", "per token"])
@pytest.mark.parametrize("source", ["sparse", "encoder"])
@pytest.mark.parametrize(
    "how",
    [
        {"prefill_chunk_size": 3},
        pytest.param({"prefill_chunk_size": 1, "use_cache": True}, marks=pytest.mark.slow),
        {"prompt_lookup_num_tokens": 3},
        {"assistant": True},
        {"assistant": "itself"},
    ],
    ids=str,
)
def test_the_prompt_is_what_generate_is_given_in_whatever_pieces_it_is_read(pair, how, source, edit):
    """A first pass of a part of the prompt, or of the prompt and tokens that are guessed to follow."""
    ids = tokens(rows=1)[:, [0, 1, 2, 3, 0, 1, 2]]  # repeats, so that a lookup finds guesses in the first pass
    edits = {
        "from the end": [Edit("final", CHANNEL, 4.0, "set", (-1,)), Edit("0.mlp", 2, 4.0, "set", (-3, 1))],
        "per token": counterfactual(pair.sparse.model, "final", CHANNEL, ids, ids.flip(1)),
    }[edit]
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    if "assistant" in how:
        how = {"assistant_model": pair.dense.model if how["assistant"] == "itself" else gpt2_without_eos()}
    with steered(pair, edits, source=source, strength=-20.0, at="residual"):
        plain = pair.dense.model.generate(ids, **given)
        assert torch.equal(pair.dense.model.generate(input_ids=ids, **given, **how), plain)
    assert not torch.equal(pair.dense.model.generate(ids, **given), plain)
    assert "generate" not in vars(pair.dense.model)


@pytest.mark.parametrize("mask", [LEFT, LEFT.flip(0)], ids=["first row whole", "first row padded later"])
def test_a_prompt_read_in_pieces_may_be_padded(pair, mask):
    edits = [Edit("final", CHANNEL, 4.0, "set", (-1,)), Edit("0.mlp", 2, 4.0, "set", (-3, 1))]
    how = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with steered(pair, edits, strength=-20.0, at="residual"):
        at_once = pair.dense.model.generate(tokens(), **how)
        for size in (3, 6):
            assert torch.equal(pair.dense.model.generate(tokens(), prefill_chunk_size=size, **how), at_once)
    assert not torch.equal(pair.dense.model.generate(tokens(), **how), at_once)


@pytest.mark.parametrize(
    ("negative", "use_cache", "scale_in"),
    in_turn(["last token", "another prompt", "the prompt and more"], [True, False], ["arguments", "model"]),
)
def test_the_prompt_of_guidance_is_its_own(pair, negative, scale_in, use_cache):
    """Logits of the prompt and of the guidance's prompt, each edited at its own end, combined as guidance does."""
    ids, model, scale = tokens(rows=1), pair.dense.model, 1.5
    ids[0, -1] = ids[0, 0]  # the guidance's prompt, the last token, is then the first one's by chance
    more = torch.tensor([[3, 5, 2]])
    unguided = {"last token": ids[:, -1:], "another prompt": more}.get(negative, torch.cat([ids, more[:, :2]], 1))
    how = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "use_cache": use_cache}
    how |= {"negative_prompt_ids": None if negative == "last token" else unguided}
    how |= {"output_scores": True, "return_dict_in_generate": True}
    if scale_in == "model":
        model.generation_config.guidance_scale = scale
    else:
        how["guidance_scale"] = scale
    with steered(pair, Edit(SITE, CHANNEL, 4.0, "set", -1)):
        found = model.generate(ids, **how)
    new = found.sequences[:, ids.shape[1] :]
    for step, scores in enumerate(found.scores):
        parts = []
        for prompt in (ids, unguided):
            with steered(pair, Edit(SITE, CHANNEL, 4.0, "set", prompt.shape[1] - 1)):
                whole = torch.cat([prompt, new[:, :step]], 1)
                parts.append(logits(pair, whole)[:, -1].log_softmax(-1))
        torch.testing.assert_close(scores, parts[1] + scale * (parts[0] - parts[1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("negative", [None, torch.tensor([[0, 5, 2]])], ids=["no guidance", "negative prompt"])
def test_a_generate_without_a_prompt_starts_from_the_token_that_it_reads_first(pair, negative):
    """Position -1 is that token, with a cache or without, and the guidance's prompt may begin with it."""
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1, "output_scores": True}
    how |= {"return_dict_in_generate": True}
    if negative is not None:
        how |= {"guidance_scale": 1.5, "negative_prompt_ids": negative}
    start, found = torch.zeros(1, 1).long(), []
    with steered(pair, Edit(SITE, CHANNEL, 4.0, "set", -1)):
        for given in ({"inputs": start, "use_cache": True}, {"use_cache": True}, {"use_cache": False}):
            found.append(pair.dense.model.generate(**given, **how))
    for one in found[1:]:
        assert torch.equal(one.sequences, found[0].sequences)
        torch.testing.assert_close(one.scores, found[0].scores)
    plain = pair.dense.model.generate(start, **how)
    assert not torch.allclose(plain.scores[0], found[0].scores[0])


def test_a_value_per_token_must_fit_the_prompt_of_guidance_too(pair):
    ids = tokens(rows=1)
    value = counterfactual(pair.sparse.model, SITE, CHANNEL, ids, ids.flip(1))
    with steered(pair, value), pytest.raises(ValueError, match=r"value=\(1, 7\) is longer than the prompts, \(1, 1\)"):
        pair.dense.model.generate(ids, guidance_scale=1.5, max_new_tokens=2, pad_token_id=0)


@pytest.mark.parametrize("at", ["read", "residual"])
def test_in_a_loop_over_growing_prefixes_without_a_cache_every_call_is_a_prompt(pair, at):
    """Position -1 is then the last token of every call."""
    prefixes, expected = [tokens()[:, :width] for width in range(3, 7)], []
    with torch.no_grad():
        for ids in prefixes:
            with steered(pair, Edit(SITE, CHANNEL, 5.0, positions=ids.shape[1] - 1), at=at):
                expected.append(pair.dense.model(ids, use_cache=False).logits)
        with steered(pair, Edit(SITE, CHANNEL, 5.0, positions=-1), at=at):
            found = [pair.dense.model(ids, use_cache=False).logits for ids in prefixes]
    for ids, one, other in zip(prefixes, found, expected, strict=True):
        assert torch.equal(one, other)
        assert not torch.allclose(one[:, -1], logits(pair, ids)[:, -1])


def test_generate_may_be_given_the_new_tokens_of_a_chat_alone(pair):
    """With the mask of the whole row, as Hugging Face asks for it."""
    ids, model, edit = tokens(rows=1), pair.dense.model, Edit("final", CHANNEL, 4.0, "set", -1)
    how = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    how |= {"return_dict_in_generate": True, "attention_mask": torch.ones_like(ids)}
    cache = DynamicCache(config=model.config)
    with steered(pair, edit, at="residual"), torch.no_grad():
        expected = model.generate(ids, **how).logits[0]
        model(ids[:, :4], past_key_values=cache)
        found = model.generate(ids[:, 4:], past_key_values=cache, **how).logits[0]
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, model.generate(ids, **how).logits[0], atol=1e-3)


def test_a_value_per_token_is_of_the_tokens_that_generate_is_given(pair):
    """The new ones of a chat too: the second turn of two equals one of zeros and the same value."""
    ids, model, mask = tokens(rows=1), pair.dense.model, torch.ones(1, 7).long()
    value = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)
    how = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    how |= {"output_logits": True, "return_dict_in_generate": True}
    whole = torch.cat([torch.zeros(1, 4, dtype=torch.float64), value], 1)
    with steered(pair, Edit(SITE, CHANNEL, whole, "add")):
        expected = model.generate(ids, **how).logits
    cache = model(ids[:, :4], use_cache=True).past_key_values
    with steered(pair, Edit(SITE, CHANNEL, value, "add")):
        found = model.generate(ids[:, 4:], past_key_values=cache, **how).logits
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
