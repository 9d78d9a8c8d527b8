"""Planted massive tokens: what is left out, and that everything else is as it was without them."""

import math

import pytest
import torch
from pairs import MASK, at, counted_places, gpt2, join, sparse_model, tokens

import bridges
from bridges.bridge import Bridge, BridgeSet
from bridges.fitting import closed_form
from bridges.fitting.closed_form import measure_read_scales, solve_bridges
from bridges.fitting.massive import MassiveMoments, norm_limit, set_norm_limits, with_massive
from bridges.fitting.ridge import Moments
from bridges.objective.pair import counted_at, trace_pair

NO_ROWS = Moments(torch.zeros(6), torch.zeros(6))
SPIKE = 12
"""The token whose embedding is made massive."""


def pair_with(scale):
    """A pair whose dense stream is `scale` times as long at one token, and the rows of that token."""
    dense = gpt2()
    with torch.no_grad():
        dense.transformer.wte.weight[SPIKE] *= scale
    return join(dense, sparse_model())


def rows(with_spikes):
    ids = tokens(40, 10, seed=5)
    ids[ids == SPIKE] = 3
    if with_spikes:
        ids[:12, 4] = SPIKE
    return ids


def test_the_limit_is_a_multiple_of_the_median_norm_about_the_channels_medians():
    h = torch.randn(501, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 100
    median = h.sort(0).values[250]
    norms = (h - median).norm(dim=1).sort().values
    found = norm_limit(h, 20.0)
    assert torch.equal(found.median, median)
    assert found.limit == pytest.approx(20 * norms[250].item(), rel=1e-12)


def test_a_minority_of_massive_tokens_hardly_moves_the_limit():
    h = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))
    before = norm_limit(h, 20.0).limit
    h[:100] *= 1e4
    assert norm_limit(h, 20.0).limit == pytest.approx(before, rel=0.2)


def test_a_stream_that_is_the_same_at_most_tokens_has_no_limit():
    h = torch.ones(10, 3)
    h[0] = 50.0
    assert norm_limit(h, 20.0).limit == math.inf


def test_massive_tokens_are_those_whose_norm_is_over_the_limit_in_either_stream():
    pair, ids = pair_with(1e4), rows(with_spikes=True)
    set_norm_limits(pair, [(ids, None)], 20.0)
    with torch.no_grad():
        traces = trace_pair(pair, ids)
    for i, bridge in enumerate(pair.bridge_set):
        h = traces.dense.residuals[i]
        expected = torch.ones_like(ids, dtype=torch.bool)
        expected[:, 0] = False
        by_norm = (h - bridge.median_dense).norm(dim=-1) <= bridge.norm_limit_dense
        assert torch.equal(counted_at(pair, traces, i), expected & by_norm)
    # The embedding is massive at the planted token alone.
    left_out = ~counted_at(pair, traces, 0)
    left_out[:, 0] = False
    assert torch.equal(left_out, (ids == SPIKE) & (torch.arange(10) > 0))


def test_no_token_is_left_out_where_the_threshold_is_off():
    pair, ids = pair_with(1e4), rows(with_spikes=True)
    set_norm_limits(pair, [(ids, None)], 20.0)
    set_norm_limits(pair, [(ids, None)], None)
    assert all(bridge.norm_limit_dense == math.inf == bridge.norm_limit_sparse for bridge in pair.bridge_set)
    with torch.no_grad():
        counted = counted_at(pair, trace_pair(pair, ids), 0)
    assert not counted[:, 0].any() and counted[:, 1:].all()


def test_planted_massive_tokens_leave_the_first_sites_solution_where_it_was_without_them():
    """At the first site the stream of a token does not depend on the others, so the two fits see the same tokens."""
    fitted = {}
    for scale in (1e3, 1e6):
        pair, ids = pair_with(scale), rows(with_spikes=True)
        set_norm_limits(pair, [(ids, None)], 20.0)
        solve_bridges(pair, [(ids, None)], 1e-3, 1e9)
        measure_read_scales(pair, [(ids, None)])
        fitted[scale] = {name: t.clone() for name, t in pair.bridge_set[0].state_dict().items()}
    padded = rows(with_spikes=True)
    mask = (padded != SPIKE).long()
    pair = pair_with(1.0)
    with torch.no_grad():
        traces = trace_pair(pair, padded)
        counted = mask.bool() & (torch.arange(10) > 0)
        h, z = traces.dense.residuals[0][counted], traces.sparse.residuals[0][counted]
    std = h.std(0, unbiased=False)
    design = torch.cat([(h - h.mean(0)) / std, (1e-3 * len(h)) ** 0.5 * torch.eye(8, dtype=h.dtype)])
    target = torch.cat([z - z.mean(0), torch.zeros(8, 12, dtype=h.dtype)])
    expected = torch.linalg.lstsq(design, target).solution.T / std
    for scale, found in fitted.items():
        torch.testing.assert_close(found["encoder_weight"], expected, rtol=1e-8, atol=1e-10, msg=str(scale))
        rms = (h - h.mean(-1, keepdim=True)).square().mean(-1).sqrt().mean()
        torch.testing.assert_close(found["rms_dense"], rms, rtol=1e-10, atol=0)


def stream_with_sinks(consistent):
    """2,000 usual tokens and 12 massive ones, whose second stream is the same linear map of the first or noise."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, rotation = draw(2012, 6) + 3, torch.linalg.qr(draw(6, 6)).Q
    x[2000:] *= 500
    y = x @ rotation.T + 0.3 * draw(2012, 6)
    if not consistent:
        y[2000:] = 500 * draw(12, 6)
    return x, y


def bridge_with_limits(x, y):
    bridge = Bridge(x.shape[1], y.shape[1], 2, dtype=torch.float64)
    for side, h in (("dense", x), ("sparse", y)):
        found = norm_limit(h, 20.0)
        getattr(bridge, f"median_{side}").copy_(found.median)
        getattr(bridge, f"norm_limit_{side}").fill_(found.limit)
    return bridge


def moments_of(x, y):
    moments = Moments(x.mean(0), y.mean(0))
    moments.update(x, y)
    return moments


def test_a_massive_token_is_shortened_by_one_factor_in_both_streams_until_it_meets_the_limit():
    x, y = stream_with_sinks(consistent=True)
    bridge = bridge_with_limits(x, y)
    gathered = MassiveMoments(BridgeSet([("0.attn", "0.attn")], [bridge]))
    gathered.add(0, x[2000:2005], y[2000:2005])
    gathered.add(0, x[2005:], y[2005:])
    expected = Moments(bridge.median_dense, bridge.median_sparse)
    for row_x, row_y in zip(x[2000:], y[2000:], strict=True):
        off_x, off_y = row_x - bridge.median_dense, row_y - bridge.median_sparse
        factor = min(bridge.norm_limit_dense / off_x.norm(), bridge.norm_limit_sparse / off_y.norm())
        expected.update((bridge.median_dense + factor * off_x)[None], (bridge.median_sparse + factor * off_y)[None])
    (found,) = gathered.reduced([0]).values()
    for one, two in zip(found.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-6)
    assert not MassiveMoments(BridgeSet([("0.attn", "0.attn")], [bridge])).reduced([0])


@pytest.mark.parametrize("reverse", [False, True])
def test_massive_tokens_are_fitted_to_where_their_streams_go_together_and_left_out_where_not(reverse):
    for consistent in (True, False):
        x, y = stream_with_sinks(consistent)
        bridge = bridge_with_limits(x, y)
        gathered = MassiveMoments(BridgeSet([("0.attn", "0.attn")], [bridge]))
        gathered.add(0, x[2000:], y[2000:])
        usual, massive = moments_of(x[:1500], y[:1500]), gathered.reduced([0])[0]
        for judge in (moments_of(x[1500:2000], y[1500:2000]), NO_ROWS):
            chosen = with_massive(usual, usual + massive, judge, 1e-6, reverse)
            assert chosen.to_massive == consistent
            solved_from = usual + massive if consistent else usual
            for found, expected in zip(chosen.solution, solved_from.solve(1e-6, reverse), strict=True):
                assert torch.equal(found, expected)
    assert not with_massive(usual, None, NO_ROWS, 1e-6).to_massive


def test_rows_set_aside_judge_the_fit_to_massive_tokens_whatever_the_ridge(monkeypatch):
    pair, ids = pair_with(1e4), rows(with_spikes=True)
    set_norm_limits(pair, [(ids, None)], 20.0)
    judges = []

    def judged(usual, everything, heldout, *rest):
        judges.append((int(heldout.n), everything is not None))
        return with_massive(usual, everything, heldout, *rest)

    monkeypatch.setattr(closed_form, "with_massive", judged)
    for ridge in (1e-3, "auto"):
        solve_bridges(pair, [(ids[:30], None)], ridge, 1e9, selection=[(ids[30:], None)])
        assert judges[:2] == [(90, True)] * 2  # ten rows of ten tokens, without each row's first
        judges.clear()


def test_a_report_counts_them_and_gives_the_nmse_with_them_beside():
    pair, ids = pair_with(1e4), rows(with_spikes=True)
    settings = {"steps": 0, "progress": False, "sites": ("0.attn",), "ridge": 1e-3}
    found = bridges.fit(pair.dense, pair.sparse, ids, eval_data=ids[:20], **settings)
    (site,) = found.report.sites
    assert site.massive_share == pytest.approx(12 / (20 * 9))
    assert site.nmse_decode_all_tokens > 0.9 > 0.7 > site.nmse_decode
    assert "massive" in str(found.report) and "6.67%: " in str(found.report)
    every = bridges.fit(pair.dense, pair.sparse, ids, eval_data=ids[:20], massive_threshold="off", **settings)
    assert every.report.sites[0].massive_share == 0
    assert every.report.sites[0].nmse_decode == every.report.sites[0].nmse_decode_all_tokens
    # The rule travels with the bridges.
    with torch.no_grad():
        losses = bridges.hybrid_losses(pair.dense, pair.sparse, found, ids[:20])
    assert losses.nmse_decode.item() == pytest.approx(site.nmse_decode, rel=1e-9)


def test_padding_and_first_tokens_are_no_part_of_the_medians():
    pair, ids = join(gpt2(), sparse_model()), tokens()
    set_norm_limits(pair, [(ids, MASK)], 20.0)
    with torch.no_grad():
        h = at(trace_pair(pair, ids, MASK).dense.residuals[1], counted_places(ids, MASK))
    assert torch.equal(pair.bridge_set[1].median_dense, h.median(0).values)
