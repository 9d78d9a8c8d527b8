"""pretrain() on two processes that add up their gradients."""

import json

import pytest
from fits import rows as with_speed
from pairs import relative
from several_processes import finished, separately

from bridges.models.sparse.model import SparseTransformer
from bridges.sparsity import projection

SETTINGS = {
    "steps": 8,
    "batch_size": 4,
    "lr": 1e-2,
    "move_every": 2,
    "log_every": 2,
    "eval_every": 4,
    "checkpoint_every": 100,
}
SETTINGS |= {"start_density": 0.6, "target_density": 0.3, "gradient_accumulation_steps": 2}


def rows(folder):
    """The rows of `metrics.jsonl` without the clock."""
    return [{k: v for k, v in row.items() if k != "steps_per_second"} for row in with_speed(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("support", ["moving", "projected"])
def test_two_processes_are_one_with_the_doubled_batch_and_continue_after_ctrl_c(tmp_path, support):
    """Ctrl-C reaches one of them; both end after the same step, and both resume."""
    finished(separately("pretrain", tmp_path, json.dumps({**SETTINGS, "support": support})))
    one, two = (SparseTransformer.from_pretrained(tmp_path / name / "sparse") for name in ("one", "two"))
    assert projection.density(one) == pytest.approx(0.3, abs=0.05)
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert (p != 0).equal(q != 0) and relative(q.detach(), p.detach()) < 1e-8, name
    assert len(rows(tmp_path / "one")) == len(rows(tmp_path / "two")) == 4
    for row, same_row in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert row.keys() == same_row.keys() and "eval/kl" in rows(tmp_path / "two")[-1]
        assert list(same_row.values()) == pytest.approx(list(row.values()), rel=1e-8)

    assert sorted(p.name for p in (tmp_path / "resumed/checkpoints").iterdir()) == ["step-00000005", "step-00000008"]
    file = "sparse/sparse_model.safetensors"
    assert (tmp_path / "resumed" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert rows(tmp_path / "resumed") == rows(tmp_path / "two")
