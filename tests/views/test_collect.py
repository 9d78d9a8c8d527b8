import pytest
import torch
from pairs import gpt2, join, neox, sparse_model, tokens, with_units

from bridges.channels.prompts import frozen_pair
from bridges.evaluate import evaluate
from bridges.report.page import render_page
from bridges.views.collect import Results, page_data


def data_of(dense, sparse, site_map=None, **arguments):
    """The page's data of a joined pair without tasks."""
    pair = with_units(join(dense, sparse, site_map=site_map))
    rows = tokens(6, 7)
    report = evaluate(dense, sparse, pair.bridge_set, rows, progress=False)
    with frozen_pair(dense, sparse, pair.bridge_set, check_models=False) as models:
        return page_data(models, Results(report, **arguments), [], None, text=rows, progress=False), report


def test_two_models_of_any_kind_have_a_page_without_circuits():
    data, report = data_of(gpt2(), gpt2(width=12, seed=4))
    assert data["circuits"] == data["channels"] == {} and data["tasks"] == [] and data["headline"] == ""
    assert data["models"]["sparse"]["nonzeros"] is None and data["models"]["sparse"]["width"] == 12
    for site, expected in zip(data["bridges"]["sites"], report.sites, strict=True):
        assert site["kl_sparse_to_dense"] == pytest.approx(expected.kl_sparse_to_dense, rel=1e-4)
        assert (site["d_dense"], site["d_sparse"], site["k"], site["dense_site"]) == (8, 12, 4, site["name"])
    assert "<title>Bridges</title>" in render_page(data)


def test_nonzeros_are_counted_in_all_parameters_and_layers_by_their_names():
    sparse = sparse_model()
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.zero_()
        sparse.lm_head.weight[:, 0] = 1.0
    found = data_of(gpt2(), sparse)[0]["models"]["sparse"]
    assert found["nonzeros"] == 17 and found["layers"] == 2
    assert data_of(neox(), sparse_model(), site_map=[("0.block", "0.attn")])[0]["models"]["dense"]["layers"] == 2


def test_steering_of_tasks_that_the_page_does_not_have_is_left_out():
    sweep = {"site": "0.attn", "channel": 3, "p_target": [0.1, 0.9], "p_target_sparse_model": [0.1, 0.8]}
    data, _ = data_of(gpt2(), sparse_model(), steering={"for_while": {"one": sweep, "few": None}})
    assert data["headline"] == "" and data["channels"] == {}
