"""generate() inside steer(): with a cache or without, greedy, sampled or with beams."""

import pytest
import torch
from pairs import join, sparse_model, tokens, with_units
from steered import CHANNEL, DENSE, EDITS, LEFT, SITE, in_turn, logits, steered, written_out

from bridges.steering.counterfactual import counterfactual
from bridges.steering.edits import Edit

GENERATIONS = {
    "greedy": dict(do_sample=False),
    "sampled": dict(do_sample=True, temperature=1.5),
    "beams": dict(do_sample=False, num_beams=3),
    "several sequences": dict(do_sample=True, num_return_sequences=2),
    "beams, sampled": dict(do_sample=True, num_beams=2),
}

READING = {
    "set, sparse": (EDITS["set"], {"source": "sparse"}),
    "scale, encoder": (EDITS["scale"], {"source": "encoder"}),
    "several, sparse": (EDITS["several"], {"source": "sparse", "at": "residual"}),
    "several, encoder": (EDITS["several"], {"source": "encoder"}),
    "constant": (EDITS["add"], {"sparse": None}),
    "positions": ([Edit(SITE, 2, 1.0, "add", (0, -1)), Edit("0.mlp", 1, 2.0, positions=8)], {}),
}


def ways():
    """Every way to generate with every kind of edit, on one model or the other."""
    for how, reading, dense in in_turn(GENERATIONS, READING, list(DENSE)):
        quick = how in ("greedy", "beams") and reading in ("set, sparse", "several, encoder", "positions")
        marks = () if quick else (pytest.mark.slow,)
        yield pytest.param(dense, how, reading, id=f"{dense}, {how}, {reading}", marks=marks)


@pytest.mark.parametrize(("dense", "how", "reading"), ways())
def test_generation_is_the_same_with_and_without_a_cache(dense, how, reading):
    edits, options = READING[reading]
    pair, ids = with_units(join(DENSE[dense](), sparse_model())), tokens()
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        with steered(pair, edits, **options):
            found.append(
                pair.dense.model.generate(
                    ids, attention_mask=LEFT, max_new_tokens=5, use_cache=use_cache, pad_token_id=0, **GENERATIONS[how]
                )
            )
    assert torch.equal(*found)


def test_generation_is_the_formula_token_by_token(pair):
    ids, edits = tokens(), EDITS["several"]
    with steered(pair, edits, strength=8.0):
        options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0)
        found = pair.dense.model.generate(ids, **options)
    for _ in range(5):
        with torch.no_grad():
            step = written_out(pair, edits, ids, None, 8.0, "read", "sparse")
        ids = torch.cat([ids, step[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, ids)
    assert not torch.equal(found, pair.dense.model.generate(tokens(), **options))


def test_a_counterfactual_acts_in_the_prompt_and_not_after_it(pair):
    """Under beams too, where generate repeats every prompt."""
    ids = tokens()
    edit = counterfactual(pair.sparse.model, SITE, CHANNEL, ids, ids.roll(1, 0))
    for how in ({"num_beams": 2}, {"num_beams": 1}):
        found = []
        for use_cache in (True, False):
            with steered(pair, edit, strength=3.0):
                found.append(
                    pair.dense.model.generate(
                        ids, max_new_tokens=4, do_sample=False, use_cache=use_cache, pad_token_id=0, **how
                    )
                )
        assert torch.equal(*found)
    longer = torch.cat([ids, ids[:, :2]], 1)
    padded = Edit(SITE, CHANNEL, torch.cat([edit.value, torch.zeros(4, 2, dtype=torch.float64)], 1), "add")
    with steered(pair, edit):
        short = logits(pair, longer)
    with steered(pair, padded):
        assert torch.equal(logits(pair, longer), short)


def test_a_counterfactual_on_padded_prompts_needs_no_cache(pair):
    ids = tokens()
    edit = counterfactual(pair.sparse.model, SITE, CHANNEL, ids, ids.roll(1, 0), LEFT)
    how = {"attention_mask": LEFT, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = []
    for use_cache in (True, False):
        with steered(pair, edit, strength=3.0):
            found.append(pair.dense.model.generate(ids, use_cache=use_cache, **how))
    assert torch.equal(*found)
