import pytest
import torch
from pairs import gpt2, join, neox, sparse_model, tokens

from bridges.config import FitConfig
from bridges.fitting import timings
from bridges.fitting.plan import Work, describe, estimate_seconds
from bridges.objective.pair import ModelPair

SETTINGS = {"steps": 100, "batch_size": 4, "gradient_accumulation_steps": 2}
WORK = Work(train_rows=10_000, seq_len=10, heldout_rows=500, kl_rows=80, start_rows=5_000, evaluations=1, world_size=2)


def plan(pair=None, work=WORK, seconds=None, **settings):
    pair = pair or join(gpt2(), sparse_model())
    seconds = {"closed form": 30.0, "evaluation": 200.0} if seconds is None else seconds
    return describe(pair, FitConfig(**{**SETTINGS, **settings}), work, seconds).splitlines()


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_sizes_of_models_and_data_are_those_counted_by_hand():
    sites, parameters, data, steps, memory, time = plan()
    assert sites == "bridges: 5 sites (0.attn, 0.mlp, 1.attn, 1.mlp, final), widths 8 and 12, k = 4"
    # A bridge: 2 * 8 * 12 weights and 8 + 12 biases.
    assert parameters.startswith(f"parameters: {5 * 212 / 1e3:.3g}k in bridges; models")
    assert parameters.endswith(
        f"{count(gpt2()) / 1e3:.3g}k dense (frozen), {count(sparse_model()) / 1e3:.3g}k sparse (frozen)"
    )
    assert data == "data: 10000 rows of 10 tokens, 500 more held out, 80 of them for the KLs"
    # 100 steps of 4 * 2 rows on each of 2 processes, 10 tokens each.
    assert steps == "closed form from 50k tokens, then 100 steps of 16 rows = 16k tokens, 2 of 5 sites a step"
    assert memory.startswith("memory: about 0 MiB for parameters")
    assert time == "time: about 4 min on this machine (closed form 30 s, evaluation 3 min)"


def test_the_plan_names_the_start_and_the_sites_of_a_step():
    steps = plan(closed_form=False, sites_per_step="all", steps=0)[3]
    assert steps == "random start, then 0 steps of 16 rows = 0 tokens, 5 of 5 sites a step"
    few = WORK._replace(train_rows=30, start_rows=30)
    assert plan(work=few)[3].startswith("closed form from 300 tokens, then")


def test_tokens_of_the_plan_are_those_without_padding():
    lines = plan(work=WORK._replace(real_share=0.25))
    assert lines[2].startswith("data: 10000 rows of 10 tokens (25k tokens without padding), 500 more held out")
    assert lines[3].startswith("closed form from 12.5k tokens, then 100 steps of 16 rows = 4k tokens")


def test_a_resumed_run_says_where_it_resumes_and_plans_what_is_left():
    resumed = WORK._replace(steps_done=40, start_rows=0)
    lines = plan(work=resumed)
    assert lines[3] == "resumes at step 40, then 60 steps of 16 rows = 9.6k tokens, 2 of 5 sites a step"
    assert lines[4].endswith("0 MiB for moments")
    assert plan(work=resumed, steps=40)[3].startswith("resumes at step 40, then 0 steps")


def test_the_plan_names_a_sparse_model_that_trains_and_pairs_of_sites_with_different_names():
    lines = plan(join(neox(), sparse_model()), train_sparse=True)
    assert "3 sites (0.block=0.attn, 1.block=1.attn, final)" in lines[0]
    assert "sparse (training)" in lines[1]


def test_the_plan_of_many_sites_fits_on_a_screen():
    pair = join(gpt2(layers=30), sparse_model(layers=30))
    lines = plan(pair)
    assert "61 sites (0.attn, 0.mlp, 1.attn, ..., final)" in lines[0]
    assert len(lines) <= 8 and max(map(len, lines)) < 160


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "under 1 s"), (42.4, "42 s"), (600.0, "10 min"), (3 * 3600.0, "3.0 h")]
)
def test_durations_are_given_in_units_that_fit(seconds, text):
    whole = text if text.startswith("under") else f"about {text}"
    assert plan(seconds={"evaluation": seconds})[5] == f"time: {whole} on this machine (evaluation {text})"


def test_every_part_that_will_run_has_its_seconds_and_nothing_changes():
    pair = join(gpt2(), sparse_model())
    before = {name: t.clone() for name, t in pair.bridge_set.tensors().items()}
    state = torch.random.get_rng_state()
    batch = tokens(8, 10), None
    found = estimate_seconds(pair, FitConfig(**SETTINGS), WORK, batch)
    assert set(found) == {"closed form", "steps", "choosing the best state", "evaluation"}
    assert all(value > 0 for value in found.values())
    random_start = estimate_seconds(pair, FitConfig(steps=0, closed_form=False), WORK, batch)
    assert set(random_start) == {"scales of the streams", "evaluation"}
    trained = estimate_seconds(pair, FitConfig(**SETTINGS, train_sparse=True), WORK, batch)
    assert set(trained) == {"closed form", "scales of the streams", "steps", "evaluation"}
    for name, tensor in pair.bridge_set.tensors().items():
        assert torch.equal(tensor, before[name]) or (tensor.isnan() & before[name].isnan()).all()
    assert all(p.grad is None for model in (pair.bridge_set, pair.sparse.model) for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.fixture
def a_second_each(monkeypatch):
    """Every part that is timed takes one second on its 80 tokens."""
    monkeypatch.setattr(timings, "_time", lambda run, pair: 1.0)


def seconds(work=WORK, **settings):
    pair = join(gpt2(), sparse_model())
    return estimate_seconds(pair, FitConfig(**{**SETTINGS, **settings}), work, (tokens(8, 10), None))


def test_a_resumed_run_takes_the_time_of_what_is_left(a_second_each):
    whole, left = seconds(), seconds(WORK._replace(steps_done=40))
    assert "closed form" in whole and set(left) == {"steps", "choosing the best state", "evaluation"}
    assert left["steps"] == pytest.approx(0.6 * whole["steps"])
    assert left["choosing the best state"] == pytest.approx(6 / 11 * whole["choosing the best state"])
    assert set(seconds(WORK._replace(steps_done=100))) == {"evaluation"}


def test_scales_that_the_closed_form_does_not_give_are_planned(a_second_each):
    work, padded = (
        WORK._replace(standardization_tokens=8000, read_scale_tokens=16_000, real_share=share) for share in (1.0, 0.5)
    )
    assert "scales of the streams" not in seconds(work)
    # Of each of two processes, on 80 tokens a second: run once for all sites, and multiplied at each of five.
    random_start = (4000 + 2048 + 5 * 4000) / 80 + 8000 / 80
    assert seconds(work, closed_form=False)["scales of the streams"] == pytest.approx(random_start)
    halved = (8000 + 2 * 2048 + 5 * 4000) / 80 + 16_000 / 80
    assert seconds(padded, closed_form=False)["scales of the streams"] == pytest.approx(halved)
    trained = seconds(work, train_sparse=True)["scales of the streams"]
    assert trained == pytest.approx((8000 + 2048) / 80)
    left = seconds(work._replace(steps_done=40), closed_form=False)["scales of the streams"]
    assert left == pytest.approx(8000 / 80)


def test_several_micro_batches_run_forward_twice(a_second_each):
    """A step of two has a forward pass over each more than a step of one with twice the rows."""
    one = seconds(gradient_accumulation_steps=1, batch_size=8)["steps"]
    assert seconds(gradient_accumulation_steps=2, batch_size=4)["steps"] - one == pytest.approx(100 * 80 / 80)


def test_a_path_through_both_models_is_planned_as_one_more_site(monkeypatch):
    monkeypatch.setattr(
        timings.Timings, "measure", lambda *given: timings.Timings(*[1.0] * len(timings.Timings._fields))
    )
    more = seconds(sites_per_step=3)["steps"]
    assert seconds(sites_per_step=2, path_weight=1.0)["steps"] == more > seconds(sites_per_step=2)["steps"]


def test_padding_is_run_but_not_counted(a_second_each):
    """A quarter of the tokens is real: what medians and the best state are found on takes four times the rows."""
    whole, padded = seconds(), seconds(WORK._replace(real_share=0.25))
    assert padded["choosing the best state"] == pytest.approx(4 * whole["choosing the best state"])
    # Of each process: 25,000 tokens and those of the medians are run, and the real ones multiplied, at five sites.
    solve = 5 * 2 * 1.0
    assert whole["closed form"] == pytest.approx((25_000 + 2048 + 5 * 25_000) / 80 + solve)
    assert padded["closed form"] == pytest.approx((25_000 + 4 * 2048 + 5 * 25_000 / 4) / 80 + solve)
    assert padded["steps"] == whole["steps"]


def test_both_models_devices_are_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)

    class On:
        def __init__(self, device):
            self.device = torch.device(device)

    timings._wait(ModelPair(On("cuda:0"), On("cuda:1"), None))
    timings._wait(ModelPair(On("cpu"), On("cuda:2"), None))
    assert {str(device) for device in waited} == {"cuda:0", "cuda:1", "cuda:2"} and len(waited) == 3


def test_a_hundred_times_the_work_is_told_to_take_a_hundred_times_as_long(monkeypatch):
    monkeypatch.setattr(timings, "_time", lambda run, pair: 1.0)
    pair, batch = join(gpt2(), sparse_model()), (tokens(8, 10), None)
    more = WORK._replace(heldout_rows=50_000, kl_rows=8_000)
    one, two = (estimate_seconds(pair, FitConfig(steps=0), work, batch)["evaluation"] for work in (WORK, more))
    assert two == pytest.approx(100 * one)
