"""The benchmark of time to quality: what it chooses, what it calls reached, and a run on tiny models."""

import bench_fit
import pytest
import torch
from bench_fit import Models, Pace, Point, best_rate, compare, halved, seconds_to, ways
from pairs import gpt2, sparse_model


def points(*of):
    return [Point(seconds, seconds, {}, {"kl_dense_to_sparse": kl, "kl_sparse_to_dense": kl + 2}) for seconds, kl in of]


def test_a_quality_is_reached_in_the_time_of_the_shortest_run_that_has_it():
    found = points((8.0, 0.25), (4.0, 1.0), (2.0, 3.0))
    assert [one.kl for one in found] == [1.25, 2.0, 4.0]
    assert seconds_to(found, 2.0) == 4.0 and seconds_to(found, 1.9) == 8.0 and seconds_to(found, 1.0) is None


def test_budgets_are_halved_until_the_target_is_missed_or_time_is_no_longer_less():
    run = lambda budget: points((budget, 0.0 if budget > 1 else 9.0))[0]  # noqa: E731
    assert [one.budget for one in halved(run, *points((8.0, 0.0)), target=1.0)] == [4.0, 2.0, 1.0]
    assert halved(run, *points((8.0, 5.0)), target=1.0) == []
    slow = lambda budget: run(2.0)._replace(budget=budget, seconds=7.5)  # noqa: E731
    assert [one.budget for one in halved(slow, *points((8.0, 0.0)), target=1.0)] == [4.0]


@pytest.mark.parametrize(
    "best, tried, chosen", [(8e-3, 3, 8e-3), (1e-9, 5, 2e-3 / 16), (32e-3, 4, 32e-3), (1.0, 5, 32e-3 * 16)]
)
def test_a_list_of_learning_rates_goes_on_where_its_best_is_at_its_end(best, tried, chosen, capsys):
    calls = []

    def distance(rate):
        calls.append(rate)
        return abs(torch.tensor(rate / best).log().item())

    rates = (2e-3, 8e-3, 32e-3)
    assert best_rate("both", distance, rates) == pytest.approx(chosen)
    assert len(calls) == tried
    assert ("at the end of the list" in capsys.readouterr().out) == (tried == 5)


def test_work_fills_its_budget_at_the_pace_measured():
    settings = ways(Pace(1.0, 0.5), Pace(2.0, 0.01), most=1000)
    assert settings["gradient steps alone"](11) == {"closed_form": False, "steps": 20}
    assert settings["closed form alone"](7) == {"closed_form_tokens": 500, "steps": 0}
    assert settings["closed form alone"](1)["closed_form_tokens"] == bench_fit.FEWEST_TOKENS
    assert settings["closed form alone"](70)["closed_form_tokens"] == 1000
    assert settings["both"](14) == {"closed_form_tokens": 500, "steps": 12}  # 7 s of tokens, 1 to start, 6 of steps


@pytest.fixture
def tiny_models():
    dense, sparse = gpt2().float(), sparse_model().float()
    rows = torch.randint(dense.config.vocab_size, (40, 12), generator=torch.Generator().manual_seed(0))
    return Models(dense, sparse, rows[:30], rows[30:33], rows[33:])


def test_every_way_is_measured_and_said_how_long_it_takes(tiny_models, monkeypatch, capsys):
    monkeypatch.setattr(bench_fit, "PROBES", {"steps": (1, 20), "tokens": (20, 200)})
    monkeypatch.setattr(bench_fit, "SETTINGS", bench_fit.SETTINGS.with_settings({"seq_len": 12, "batch_size": 2}))
    monkeypatch.setattr(Pace, "of", lambda *given: Pace(0.0, 0.01))
    found = compare(tiny_models, 0.1, rates=(1e-3, 1e-2), fractions=(0.5, 1.0))
    assert list(found) == ["gradient steps alone", "closed form alone", "both"]
    assert [one.settings["steps"] for one in found["gradient steps alone"]] == [5, 10]
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("| gradient steps alone")]
    assert len(table) == 3 and table[-1].count("|") == 4 and table[-1].split("|")[3].strip() == "1.0"
    assert sum("chosen" in line for line in lines) == 2
    assert all(one.seconds > 0 and one.kl > 0 for points in found.values() for one in points)
