import pytest
from pairs import gpt2, join, neox, sparse_model

from bridges.config import FitConfig
from bridges.fitting.plan import describe

SETTINGS = {"steps": 100, "batch_size": 4, "gradient_accumulation_steps": 2, "closed_form_tokens": 50_000}


def plan(pair=None, rows=10_000, processes=2, **settings):
    pair = pair or join(gpt2(), sparse_model())
    return describe(pair, FitConfig(**{**SETTINGS, **settings}), rows, 10, 500, processes).splitlines()


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_sizes_of_models_and_data_are_those_counted_by_hand():
    sites, parameters, data, steps, _, _ = plan()
    assert sites == "bridges: 5 sites (0.attn, 0.mlp, 1.attn, 1.mlp, final), widths 8 and 12, k = 4"
    # A bridge: 2 * 8 * 12 weights and 8 + 12 biases.
    assert parameters.startswith(f"parameters: {5 * 212 / 1e3:.3g}k in bridges; models")
    assert parameters.endswith(
        f"{count(gpt2()) / 1e3:.3g}k dense (frozen), {count(sparse_model()) / 1e3:.3g}k sparse (frozen)"
    )
    assert data == "data: 10000 rows of 10 tokens, 500 more held out"
    # 100 steps of 4 * 2 rows on each of 2 processes, 10 tokens each.
    assert steps == "closed form from 50k tokens, then 100 steps of 16 rows = 16k tokens, 2 of 5 sites a step"


def test_the_plan_names_the_start_and_the_sites_of_a_step():
    steps = plan(closed_form=False, sites_per_step="all", steps=0)[3]
    assert steps == "random start, then 0 steps of 16 rows = 0 tokens, 5 of 5 sites a step"
    assert plan(rows=30)[3].startswith("closed form from 300 tokens, then")
    started = "closed form from 300 tokens and 30 pairs of rows, then"
    assert plan(rows=30, interchange_weight=0.1)[3].startswith(started)


def test_the_plan_names_a_sparse_model_that_trains_and_pairs_of_sites_with_different_names():
    lines = plan(join(neox(), sparse_model()), train_sparse=True)
    assert "3 sites (0.block=0.attn, 1.block=1.attn, final)" in lines[0]
    assert "sparse (training)" in lines[1]


def test_the_cost_includes_the_pairs_of_rows_of_the_interchange_loss():
    """At 40 pairs of 10 tokens: both rows forward, one of them backward, through both models."""
    settings = {"steps": 0, "closed_form_tokens": 1000, "interchange_pairs": 40}
    without, with_pairs = (
        float(plan(**settings, interchange_weight=w)[5].split()[2].removesuffix("MFLOP")) for w in (0.0, 0.1)
    )
    flops = 40 * 10 * 6 * (count(gpt2()) + count(sparse_model()))
    assert with_pairs - without == pytest.approx(flops / 1e6, rel=0.02)


@pytest.mark.parametrize("steps", [1000, 3000])
def test_the_cost_of_the_steps_is_the_one_counted_by_hand(steps):
    d, s, b = count(gpt2()), count(sparse_model()), 5 * 212
    # Both forward, the bridges forward and backward, and 2 of 5 sites' tails: half of each model, 4 FLOPs a weight.
    flops = 16 * 10 * steps * (2 * d + 2 * s + 6 * b + 1.0 * (4 * d + 4 * s))
    assert plan(closed_form=False, steps=steps)[5] == f"cost: about {flops / 1e9:.3g} GFLOP over 2 process(es)"
