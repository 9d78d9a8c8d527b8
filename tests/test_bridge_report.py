import json
import math
import re
from dataclasses import replace

import pytest
import yaml

from bridges.bridge_report import FIGURES, BridgeReport, SiteFigures, model_card


@pytest.fixture
def report():
    one = SiteFigures("0.attn", 0.25, 0.125, 0.5, 1.0, 2.0, 8.0, 9.0, 1.5, 0.75, -0.5)
    two = SiteFigures("final", 0.75, 0.375, 1.0, 3.0, 4.0, 10.0, 11.0, 2.5, 0.25, 0.5)
    return BridgeReport((one, two), 2.5, 2.75, 0.375, 1234, {"steps": 3, "sites": None}, {"torch": "2"})


KEYS = {
    "nmse_encode",
    "nmse_encode_floor",
    "nmse_decode",
    "kl_dense_to_sparse",
    "kl_sparse_to_dense",
    "kl_dense_to_sparse_mean_ablation",
    "kl_sparse_to_dense_mean_ablation",
    "nmse_decode_shuffled",
    "ce_recovered_dense_to_sparse",
    "ce_recovered_sparse_to_dense",
    "massive_share",
    "nmse_encode_all_tokens",
    "nmse_decode_all_tokens",
}
ERRORS = {"kl_dense_to_sparse_se", "kl_sparse_to_dense_se"}


def test_the_dict_has_the_documented_keys(report):
    values = report.to_dict()
    assert set(values) == {
        "sites",
        "mean",
        "dense_ce",
        "sparse_ce",
        "kl_sparse_alone",
        "tokens",
        "settings",
        "versions",
        "nmse_tokens",
        "selection",
    }
    assert set(values["mean"]) == KEYS and set(values["sites"][0]) == KEYS | ERRORS | {"name"}
    assert set(FIGURES) == KEYS | ERRORS
    assert values["sites"][1]["kl_sparse_to_dense"] == 4.0 and values["tokens"] == 1234


def test_means_by_hand(report):
    mean = report.mean
    assert (mean["nmse_encode"], mean["kl_sparse_to_dense"], mean["nmse_decode_shuffled"]) == (0.5, 3.0, 2.0)
    assert (mean["ce_recovered_dense_to_sparse"], mean["ce_recovered_sparse_to_dense"]) == (0.5, 0.0)


def test_saved_and_loaded_it_is_equal_and_saved_again_the_same_bytes(report, tmp_path):
    report.save(tmp_path / "a.json")
    loaded = BridgeReport.load(tmp_path / "a.json")
    loaded.save(tmp_path / "b.json")
    assert loaded == report and isinstance(loaded.sites, tuple)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert BridgeReport.from_dict(report.to_dict()) == report


def test_a_file_with_missing_or_unknown_keys_is_refused_by_name(report, tmp_path):
    values = report.to_dict()
    for name, broken in {
        "no sites": {k: v for k, v in values.items() if k != "sites"},
        "no tokens": {k: v for k, v in values.items() if k != "tokens"},
        "odd": values | {"other": 1},
        "odd site": values | {"sites": [{"name": "0.attn"}]},
        "not a site": values | {"sites": ["0.attn"]},
    }.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=rf"{name}.json is not a report of bridges"):
            BridgeReport.load(path)


def test_an_undefined_figure_is_nan_here_and_null_in_the_file(report, tmp_path):
    undefined = replace(report.sites[0], nmse_decode=math.nan)
    replace(report, sites=(undefined, report.sites[1]), sparse_ce=math.nan).save(tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text()
    assert "NaN" not in text
    stored = json.loads(text)
    assert stored["sites"][0]["nmse_decode"] is stored["mean"]["nmse_decode"] is stored["sparse_ce"] is None
    assert stored["settings"] == {"steps": 3, "sites": None}
    loaded = BridgeReport.load(tmp_path / "a.json")
    assert math.isnan(loaded.sites[0].nmse_decode) and math.isnan(loaded.mean["nmse_decode"])
    assert math.isnan(loaded.sparse_ce) and loaded.settings["sites"] is None
    assert loaded.sites[1] == report.sites[1] and "nan (1.50)" in str(loaded)
    loaded.save(tmp_path / "b.json")
    assert (tmp_path / "b.json").read_text() == text


def test_metric_names(report):
    flat = report.flat()
    assert len(flat) == 2 * 10 + 10 + 3  # those of massive tokens and errors are not known, so left out
    assert flat["eval/kl_sparse_to_dense/final"] == 4.0 and flat["eval/nmse_encode/0.attn"] == 0.25
    assert flat["eval/mean/nmse_decode"] == 0.75
    assert (flat["eval/dense_ce"], flat["eval/sparse_ce"], flat["eval/kl_sparse_alone"]) == (2.5, 2.75, 0.375)
    assert "test/mean/nmse_decode" in report.flat("test")


def test_the_markdown_table_puts_controls_in_brackets_behind_figures(report):
    lines = report.markdown().splitlines()
    assert len({line.count("|") for line in lines[:5]}) == 1 and lines[1] == "|---|---|---|---|---|---|"
    assert lines[2] == "| 0.attn | 0.250 (0.125) | 0.500 (1.50) | 1.000 (8.00) | 2.000 (9.00) | 0.75 / -0.50 |"
    assert lines[4] == "| **mean** | 0.500 (0.250) | 0.750 (2.00) | 2.000 (9.00) | 3.000 (10.00) | 0.50 / 0.00 |"
    assert lines[5] == "" and lines[6].startswith("1234 held-out tokens") and "dense 2.500" in lines[6]
    assert "sparse 2.750" in lines[6] and lines[6].endswith("alone 0.375.")


def test_printed_it_is_an_aligned_table(report):
    lines = str(report).splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines[:4]}) == 1
    assert lines[3].split()[:3] == ["mean", "0.500", "(0.250)"] and "|" not in lines[0] and "*" not in lines[3]


CONFIG = {
    "pairs": [["0.attn", "0.attn"], ["3.block", "1.attn"]],
    "d_dense": 48,
    "d_sparse": 96,
    "k": 24,
    "dense": {"name": "someone/dense", "fingerprint": "x"},
    "sparse": {"name": "a-sparse-model", "fingerprint": "y"},
}
CARD_REPORT = BridgeReport((SiteFigures("1.attn", *[0.125 * i for i in range(10)]),), 2.5, 2.75, 0.375, 99)


def test_the_card_names_both_models_and_holds_the_figures():
    card = model_card(CONFIG, CARD_REPORT)
    head = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])
    assert head["library_name"] == "sparse-bridges" and "interpretability" in head["tags"]
    assert "# Bridges between someone/dense and a-sparse-model" in card
    assert "(width 48)" in card and "(width 96)" in card and "k = 24" in card
    assert CARD_REPORT.markdown() in card
    assert "| 0.attn | 0.attn |\n| 3.block | 1.attn |\n" in card
    assert 'BridgeSet.from_pretrained("' in card


def test_a_card_without_figures_or_names_says_so():
    card = model_card({key: value for key, value in CONFIG.items() if key not in ("dense", "sparse")}, None)
    assert "Not evaluated." in card and "# Bridges between unknown and unknown" in card


def test_the_same_input_gives_the_same_card():
    assert model_card(CONFIG, CARD_REPORT) == model_card(dict(CONFIG), CARD_REPORT)


def test_a_site_with_massive_tokens_has_a_column_of_them(report):
    assert "massive" not in str(report)
    site = replace(report.sites[0], massive_share=0.0012, nmse_encode_all_tokens=0.9, nmse_decode_all_tokens=3.25)
    lines = str(replace(report, sites=(site, report.sites[1]))).splitlines()
    assert lines[0].endswith("massive tokens: NMSE with them") and lines[1].endswith("0.12%: 0.90 / 3.25")


def test_the_caption_says_how_many_tokens_with_what_error_and_which_step(report):
    site = replace(report.sites[0], kl_dense_to_sparse_se=0.0125, kl_sparse_to_dense_se=0.05)
    text = str(replace(report, sites=(site, report.sites[1]), nmse_tokens=9999))
    assert "1234 held-out tokens (NMSE: 9999); KL in nats per token, standard error at most 0.05." in text
    chosen = {"step": 200, "objective": 1.25, "objective_at_start": 2.5}
    end = "The state after step 200: objective 1.25 on training rows set aside, 2.5 before the first step."
    assert str(replace(report, selection=chosen)).endswith(end)
    assert "The state before the first step: " in str(replace(report, selection={**chosen, "step": 0}))


def test_reports_with_the_same_undefined_figures_are_equal(report):
    one = replace(report, sparse_ce=float("nan"))
    assert one == replace(report, sparse_ce=float("nan")) != report


def test_an_objective_that_is_not_finite_comes_back_as_nan_and_is_printed(report, tmp_path):
    chosen = {"step": 0, "objective": math.nan, "objective_at_start": math.inf}
    replace(report, selection=chosen).save(tmp_path / "report.json")
    loaded = BridgeReport.load(tmp_path / "report.json")
    assert str({"step": 0, "objective": math.nan, "objective_at_start": math.nan}) == str(loaded.selection)
    assert "objective nan on training rows set aside, nan before the first step" in str(loaded)
