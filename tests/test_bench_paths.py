"""The benchmark of paths that change sides several times, on tiny models."""

import pytest
import torch
from bench_paths import compare, path_kls, row
from pairs import gpt2, sparse_model

from bridges.bridge_report import BridgeReport, PathFigures, SiteFigures
from bridges.config import FitConfig


def test_a_row_has_means_by_the_number_of_changes():
    site = SiteFigures("0.mlp", 0.6, 0.5, 0.2, 1.5, 0.5, 3.0, 2.0, 1.9, 0.5, 0.8)
    paths = (PathFigures("dsdd", 1.0), PathFigures("sdss", 2.0), PathFigures("dsds", 6.0))
    report = BridgeReport((site,), dense_ce=2.5, sparse_ce=2.75, kl_sparse_alone=0.375, tokens=128, paths=paths)
    assert path_kls(report) == {2: 1.5, 3: 6.0}
    line = row("with", 10, 250.0, report)
    assert line["their processor s"] == "2.5" and line["KL: one change"] == "1.000"
    assert line["state after step"] == "-"
    assert (line["2 changes"], line["3 changes"], line["2 or more"]) == ("1.500", "6.000", "3.000")


def test_fits_with_and_without_paths_are_compared_at_equal_steps_and_equal_time(capsys):
    dense, sparse = gpt2().float(), sparse_model().float()
    rows = torch.randint(dense.config.vocab_size, (40, 12), generator=torch.Generator().manual_seed(0))
    settings = {"steps": 8, "batch_size": 2, "seq_len": 12, "closed_form": False, "lr": 1e-2}
    config = FitConfig(**settings, sites_per_step=1, progress=False)
    ms, reports = compare((dense, sparse), rows[:30], rows[30:], config, [2.0], n_paths=4, timed=3)
    assert list(ms) == [0.0, 2.0] and min(ms.values()) > 0
    assert list(reports) == ["without paths", "path_weight 2", "without paths, as long as 2"]
    settings = [report.settings for report in reports.values()]
    assert [one["path_weight"] for one in settings] == [0.0, 2.0, 0.0]
    assert settings[2]["steps"] == round(8 * ms[2.0] / ms[0.0])
    assert all(len(report.paths) == 4 for report in reports.values())
    assert reports["path_weight 2"].mean != pytest.approx(reports["without paths"].mean)
    assert capsys.readouterr().out.count("without paths") == 2
