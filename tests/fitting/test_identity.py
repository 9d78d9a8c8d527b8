from dataclasses import replace

import pytest
from pairs import gpt2, join, sparse_model

from bridges.config import FitConfig
from bridges.fitting.identity import RunIdentity, refuse_other_run, refuse_used_folder


def identity(dense=None, sparse=None, data="d1", versions=None, **settings):
    pair = join(dense or gpt2(layers=1), sparse or sparse_model(layers=1))
    return RunIdentity.of(pair, FitConfig(**settings), data, versions or {"torch": "1"})


def test_a_run_may_resume_with_other_reporting_resources_and_versions(tmp_path):
    stored = identity().to_dict()
    refuse_other_run(stored, identity(output_dir=tmp_path, resume=True, progress=False, report_to="wandb"))
    refuse_other_run(stored, identity(checkpoint_every=3, moments_gib=0.5))
    refuse_other_run(stored, identity(versions={"torch": "2"}))


def test_a_run_may_resume_with_half_precision_copies_of_its_models():
    stored = identity().to_dict()
    refuse_other_run(stored, identity(gpt2(layers=1).bfloat16(), sparse_model(layers=1).float()))


def test_a_sparse_model_that_trains_keeps_its_configuration():
    stored = identity(train_sparse=True).to_dict()
    refuse_other_run(stored, identity(sparse=sparse_model(layers=1, seed=8), train_sparse=True))  # weights change
    fewer = sparse_model(layers=1, afrac=0.25)
    with pytest.raises(
        ValueError, match=r"a sparse model of afrac=0\.25, but the run was started with 0\.5; pass a model"
    ):
        refuse_other_run(stored, identity(sparse=fewer, train_sparse=True))
    del stored["architecture"]  # of a run that an earlier version started
    refuse_other_run(stored, identity(sparse=fewer, train_sparse=True))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"steps": 7}, "resume=True with steps=7, but the run was started with steps=300"),
        ({"sites": ("final",)}, "sites=.'final'., but the run was started with sites=None"),
        ({"data": "d2"}, r"other data \(d2, the run was started with d1\)"),
        ({"dense": gpt2(layers=1, seed=8)}, "another dense model"),
        ({"sparse": sparse_model(layers=1, seed=8)}, "another sparse model"),
    ],
)
def test_a_different_run_is_refused_and_both_values_are_named(other, message):
    with pytest.raises(ValueError, match=message):
        refuse_other_run(identity().to_dict(), identity(**other))


def split(dropout=0.0, **settings):
    """The identity of a run whose step takes `processes` times `batch_size` times `gradient_accumulation_steps`."""
    found = identity()
    return replace(found, settings={**found.settings, **settings}, dropout=dropout)


def test_a_run_may_resume_on_other_processes_where_a_step_takes_as_many_rows():
    stored = split(processes=2, batch_size=8).to_dict()
    refuse_other_run(stored, split(processes=4, batch_size=4))
    refuse_other_run(stored, split(processes=1, batch_size=8, gradient_accumulation_steps=2))


@pytest.mark.parametrize(
    ("here", "remedy"),
    [
        ({"processes": 4, "batch_size": 8}, "pass batch_size=3, or use another output_dir"),
        ({"processes": 2, "gradient_accumulation_steps": 4}, "pass batch_size=6, gradient_accumulation_steps=1, or"),
        ({"processes": 5}, "start a number of processes that divides 12, or"),
    ],
)
def test_a_resume_with_other_rows_in_a_step_says_which_setting_makes_them_as_many(here, remedy):
    with pytest.raises(ValueError, match=f"but the run was started with 12 .*; {remedy}"):
        refuse_other_run(split(batch_size=12).to_dict(), split(**here))


def test_dropout_does_not_resume_on_other_processes():
    """Its masks are drawn by process."""
    stored = split(0.1, processes=2, batch_size=2).to_dict()
    refuse_other_run(stored, split(0.1, processes=2, batch_size=2))
    with pytest.raises(ValueError, match=r"processes=4, batch_size=1.*dropout=0\.1 draws its masks by process"):
        refuse_other_run(stored, split(0.1, processes=4, batch_size=1))


def test_a_resume_with_the_models_swapped_says_so_whatever_the_data():
    stored = identity().to_dict()
    for swapped in (
        identity(sparse_model(layers=1), gpt2(layers=1)),
        identity(data="d2", dense=sparse_model(layers=1)),
    ):
        with pytest.raises(ValueError, match="the run's sparse model as dense: dense and sparse are swapped"):
            refuse_other_run(stored, swapped)


def test_a_setting_added_after_a_run_started_had_its_default():
    stored = identity().to_dict()
    del stored["settings"]["massive_threshold"]
    refuse_other_run(stored, identity())
    with pytest.raises(ValueError, match=r"massive_threshold=9\.0, but .* started with massive_threshold=20\.0"):
        refuse_other_run(stored, identity(massive_threshold=9.0))


def test_a_run_of_an_earlier_version_resumes_unless_it_had_the_interchange_loss():
    stored = identity().to_dict()
    stored["settings"] |= {"interchange_weight": 0.0, "interchange_pairs": 512}
    refuse_other_run(stored, identity())
    stored["settings"]["interchange_weight"] = 0.05
    with pytest.raises(
        ValueError, match=r"interchange_weight=0\.05, and the interchange loss left in this version; use"
    ):
        refuse_other_run(stored, identity())


def test_a_sparse_model_that_trains_may_have_changed_weights():
    stored = identity(train_sparse=True)
    assert stored.sparse is None
    refuse_other_run(stored.to_dict(), identity(sparse=sparse_model(layers=1, seed=8), train_sparse=True))


def test_a_used_folder_is_refused(tmp_path):
    refuse_used_folder(None)
    refuse_used_folder(tmp_path / "new")
    refuse_used_folder(tmp_path)
    for name in ("metrics.jsonl", "config.json", "checkpoints"):
        folder = tmp_path / f"with {name}"
        folder.mkdir()
        (folder / name).mkdir() if name == "checkpoints" else (folder / name).touch()
        with pytest.raises(ValueError, match=f"already holds a run .{name}."):
            refuse_used_folder(folder)
