"""Models that were made under torch.inference_mode(): right figures, or a refusal before the work."""

import pytest
import torch
from pairs import gpt2, sparse_model, tokens

import bridges
from bridges.steering.edits import Edit

SETTINGS = {"progress": False, "k": 4, "seed": 0}


@pytest.fixture(scope="module")
def models():
    """The pair made there, then the same pair made elsewhere."""
    with torch.inference_mode():
        made_there = gpt2(dtype=torch.float32).requires_grad_(), sparse_model(dtype=torch.float32).requires_grad_()
    assert all(p.is_inference() and p.requires_grad for model in made_there for p in model.parameters())
    return made_there, (gpt2(dtype=torch.float32), sparse_model(dtype=torch.float32))


@pytest.fixture(scope="module")
def bridge_sets(models):
    rows = tokens(rows=24)
    return [bridges.fit(*pair, rows, eval_data=rows[:8], steps=0, **SETTINGS) for pair in models]


def test_the_closed_form_and_its_figures_are_the_same(models, bridge_sets):
    made_there, expected = bridge_sets
    assert made_there.report.to_dict()["sites"] == expected.report.to_dict()["sites"]
    figures = [bridges.evaluate(*pair, expected, tokens(), progress=False).to_dict()["sites"] for pair in models]
    assert figures[0] == figures[1]
    assert all(p.requires_grad for model in models[0] for p in model.parameters())


def test_steering_is_the_same(models, bridge_sets):
    found, edits = [], [Edit("0.mlp", 1, 2.0), Edit("1.attn", 3, 2.0, "add")]
    for dense, sparse in models:
        with bridges.steer(dense, bridge_sets[1], edits, sparse=sparse), torch.no_grad():
            found.append(dense(tokens()).logits)
    assert torch.equal(*found)


def test_what_needs_gradients_is_refused_before_the_work(models, bridge_sets, capsys):
    refused = pytest.raises(ValueError, match=r"was made under torch\.inference_mode\(\).*fit with steps=0")
    with refused:
        bridges.fit(*models[0], tokens(), steps=2, **SETTINGS)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ValueError, match=r"model='gpt2' was made under torch\.inference_mode"):
        bridges.hybrid_losses(*models[0], bridge_sets[1], tokens())


def test_a_fit_inside_inference_mode_is_the_same_as_outside(models, bridge_sets):
    rows = tokens(rows=24)
    with torch.inference_mode():
        found = bridges.fit(*models[1], rows, eval_data=rows[:8], steps=0, **SETTINGS)
    assert found.report.to_dict()["sites"] == bridge_sets[1].report.to_dict()["sites"]
