"""float32_precision: torch's precision of float32 products holds in a fit alone, and is recorded with it."""

import json

import pytest
import torch
from fits import raiser, run, same, shallow
from pairs import sparse_model

from bridges.fitting.trainer import Trainer


def watched():
    """Two float32 models, and the set of torch's precisions that every module of them has run in."""
    models, seen = {"dense": shallow(dtype=torch.float32), "sparse": shallow(sparse_model, dtype=torch.float32)}, set()
    for model in models.values():
        for module in model.modules():
            module.register_forward_hook(lambda *_: seen.add(torch.get_float32_matmul_precision()))
    return models, seen


@pytest.fixture(params=["highest", "high"])
def globally(request):
    """What the user has set before."""
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("precision", [None, "highest", "medium"])
def test_the_precision_holds_inside_and_the_users_own_is_back_after(globally, precision):
    models, seen = watched()
    provenance = run(**models, float32_precision=precision).provenance
    assert seen == {precision or globally} == {provenance["fit"]["float32_precision"]}
    assert torch.get_float32_matmul_precision() == globally


@pytest.mark.parametrize("error", [ValueError, FloatingPointError, KeyboardInterrupt])
def test_the_users_own_is_back_where_a_step_raises(globally, error, monkeypatch):
    models, seen = watched()
    monkeypatch.setattr(Trainer, "train_step", raiser(error("in a step")))
    with pytest.raises(error, match="in a step"):
        run(**models, float32_precision="medium")
    assert seen == {"medium"} and torch.get_float32_matmul_precision() == globally


def test_highest_gives_the_figures_of_the_default_bit_for_bit():
    assert same(run(**watched()[0]), run(**watched()[0], float32_precision="highest"))


def test_a_resume_in_another_precision_is_refused_whether_it_was_asked_for_or_torchs_own(tmp_path):
    """By default it is torch's own that counts, so it is recorded by its name."""
    settings = {"output_dir": tmp_path, "steps": 1}
    run(**watched()[0], **settings)
    states = list(tmp_path.glob("checkpoints/step-*/state.json"))
    assert states and all(json.loads(f.read_text())["settings"]["float32_precision"] == "highest" for f in states)
    for resumed in (None, "highest"):
        run(**watched()[0], **settings, resume=True, float32_precision=resumed)
    message = "resume=True with float32_precision='high', but the run was started with float32_precision='highest'"
    with pytest.raises(ValueError, match=message):
        run(**watched()[0], **settings, resume=True, float32_precision="high")
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ValueError, match=message):
            run(**watched()[0], **settings, resume=True)
        run(**watched()[0], **settings, resume=True, float32_precision="highest")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_run_of_an_earlier_version_resumes_in_any_precision(tmp_path):
    run(**watched()[0], output_dir=tmp_path, steps=1)
    for state in tmp_path.glob("checkpoints/step-*/state.json"):
        stored = json.loads(state.read_text())
        del stored["settings"]["float32_precision"]
        state.write_text(json.dumps(stored))
    run(**watched()[0], output_dir=tmp_path, steps=1, resume=True, float32_precision="high")
