"""The plan of docs/scale.md is what its script prints, by the library's own sizes."""

from pathlib import Path
from types import SimpleNamespace

import scale_plan

from bridges.config import FitConfig
from bridges.fitting.closed_form import bytes_per_site, site_groups
from bridges.objective.head import GPU_CHUNK_LOGITS

PAGE = Path(__file__).parents[1] / "docs/scale.md"


def test_the_page_shows_what_the_script_prints(capsys):
    scale_plan.main()
    assert f"\n```\n{capsys.readouterr().out}```\n" in PAGE.read_text(encoding="utf-8")


def test_the_sum_of_twice_the_rows_adds_their_streams_target_logits_and_graph():
    """By hand: 4,096 more tokens of 65 dense streams and 17 sparse ones, of 128,256 logits, of 32 layers' graph."""
    more = 4096 * (2 * (65 * 4096 + 17 * 2048) + 2 * 128_256 + 34 * 32 * 4096) / 1e9
    added = sum(scale_plan.memory(8).values()) - sum(scale_plan.memory().values())
    assert abs(added - more) < 1e-9


def test_the_plan_goes_by_the_librarys_sizes(unchecked):
    dense, sparse = (SimpleNamespace(d_model=side["width"]) for side in (scale_plan.DENSE, scale_plan.SPARSE))
    pair = SimpleNamespace(dense=dense, sparse=sparse, bridge_set=range(scale_plan.SITES))
    config = FitConfig()
    assert scale_plan.moments_per_site() == bytes_per_site(pair)
    assert config.moments_bytes == scale_plan.MOMENTS_BYTES and config.sites_per_step == scale_plan.SITES_PER_STEP
    assert scale_plan.CHUNK_LOGITS == GPU_CHUNK_LOGITS
    groups = list(site_groups(pair, config.moments_bytes))
    assert scale_plan.solved_together() == len(groups[0])
    assert 2 * scale_plan.SPARSE["layers"] + 1 == scale_plan.SITES
