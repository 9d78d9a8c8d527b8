import re

import pytest

from bridges.config import FitConfig

FIXED_NAMES = [
    "steps",
    "batch_size",
    "seq_len",
    "lr",
    "seed",
    "k",
    "ridge",
    "sites",
    "site_map",
    "sites_per_step",
    "nmse_weight",
    "kl_dense_to_sparse_weight",
    "kl_sparse_to_dense_weight",
    "ce_weight",
    "train_sparse",
    "target_density",
    "mixed_precision",
    "eval_every",
    "checkpoint_every",
    "output_dir",
    "resume",
    "report_to",
    "progress",
]

INVALID = {
    "steps": [-1, 1.5, "many"],
    "batch_size": [0],
    "gradient_accumulation_steps": [0],
    "seq_len": [1],
    "lr": [0.0, -1.0, float("nan"), float("inf")],
    "seed": [-1],
    "k": [0],
    "closed_form": ["perhaps"],
    "closed_form_tokens": [0],
    "ridge": [-1e-9, float("nan")],
    "moments_gib": [0.0],
    "nmse_weight": [-1.0, float("inf")],
    "kl_dense_to_sparse_weight": [-1.0],
    "kl_sparse_to_dense_weight": [-1.0],
    "ce_weight": [-1.0],
    "path_weight": [-1.0],
    "train_sparse": [2],
    "anneal": [-0.1, 1.1],
    "support": ["fixed"],
    "move_every": [0],
    "move_share": [1.5],
    "sparse_lr": [0.0],
    "sparse_weight_decay": [-0.1],
    "sparse_eps": [0.0],
    "mixed_precision": ["fp8"],
    "float32_precision": ["low", 32],
    "eval_every": [0],
    "eval_tokens": [0],
    "checkpoint_every": [0],
    "sampled_rows": [1],
    "report_to": ["tensorboard"],
    "progress": ["loud"],
    "sites": [3, "0.attn"],
    "site_map": [("0.attn",), 3],
    "sites_per_step": [0, -2, "some", 1.5],
}


def test_every_fixed_name_has_a_description_and_every_loss_weight_is_1():
    fields = FitConfig.model_fields
    assert not set(FIXED_NAMES) - set(fields)
    assert [name for name, field in fields.items() if not field.description] == []
    config = FitConfig()
    for name in ("nmse", "kl_dense_to_sparse", "kl_sparse_to_dense", "ce"):
        assert getattr(config, f"{name}_weight") == 1.0
    assert (config.output_dir, config.report_to, config.resume, config.train_sparse) == (None, "none", False, False)


def test_an_unknown_setting_is_refused_and_the_known_ones_are_named():
    with pytest.raises(
        ValueError, match=r"stepz=3 is not a setting of fit; did you mean steps\? The settings are steps, "
    ):
        FitConfig.from_values({"stepz": 3})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in INVALID.items() for value in values])
def test_an_invalid_value_is_refused_by_name_and_value_on_one_line(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        FitConfig.from_values({name: value})
    message = str(caught.value)
    assert re.match(rf"{name}(\.\d+)*=", message) and "\n" not in message and "pydantic" not in message
    assert str(value) in message or repr(value) in message or isinstance(value, tuple)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_density": 0.1}, "target_density=0.1 needs train_sparse=True"),
        ({"support": "moving"}, "support='moving' needs target_density"),
        (
            {"support": "moving", "train_sparse": True, "target_density": 0.1, "steps": 20, "move_every": 11},
            r"move_every=11 is over anneal \* steps = 10",
        ),
        ({"resume": True}, "resume=True needs output_dir"),
        ({"target_density": 0.0, "train_sparse": True}, "target_density=0.0 is invalid"),
        ({"target_density": 1.1, "train_sparse": True}, "target_density=1.1 is invalid"),
    ],
)
def test_a_setting_that_needs_another_is_refused_without_it(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        FitConfig.from_values(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"lrr": 1}, {"steps": -1}, {"sites": "1.mlp"}, {"resume": True}])
def test_the_class_itself_refuses_in_the_same_line(settings):
    with pytest.raises(ValueError) as expected:
        FitConfig.from_values(settings)
    with pytest.raises(ValueError) as caught:
        FitConfig(**settings)
    assert str(caught.value) == str(expected.value) and "\n" not in str(caught.value)


def test_one_site_without_a_list_is_told_how_to_be_written():
    with pytest.raises(ValueError, match=r"sites='1.mlp' is invalid: it must be a sequence, as sites=\('1.mlp',\)"):
        FitConfig(sites="1.mlp")  # pyright: ignore[reportArgumentType]


def test_every_bound_is_itself_valid():
    FitConfig.from_values(
        {"steps": 0, "ridge": 0, "nmse_weight": 0, "seq_len": 2, "k": 1, "anneal": 1, "sites_per_step": 1}
    )
    FitConfig.from_values({"target_density": 1.0, "train_sparse": True, "sites_per_step": "all", "sampled_rows": 2})


def test_a_config_is_frozen():
    config = FitConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 3
    assert config.steps == FitConfig().steps


def test_with_settings_validates_and_leaves_the_original_unchanged():
    config = FitConfig(steps=3, seed=4)
    changed = config.with_settings({"steps": 5})
    assert (config.steps, changed.steps, changed.seed) == (3, 5, 4)
    with pytest.raises(ValueError, match="steps=-1"):
        config.with_settings({"steps": -1})


def test_a_config_written_and_read_is_equal(tmp_path):
    path = tmp_path / "run.toml"
    given = {"steps": 7, "sites": ["0.attn"], "site_map": [["0.attn", "1.attn"]], "sites_per_step": "all", "lr": 0.5}
    config = FitConfig.from_values(
        {**given, "output_dir": tmp_path / "out", "train_sparse": True, "target_density": 0.25}
    )
    config.to_file(path)
    assert FitConfig.from_file(path) == config
    assert path.read_text().startswith("[fit]") and "seq_len" not in path.read_text()
    default = FitConfig()
    default.to_file(path)
    assert FitConfig.from_file(path) == default


def test_a_file_without_the_table_is_read_from_the_top(tmp_path):
    (tmp_path / "a.toml").write_text("steps = 9\nsite_map = [['0.attn', '1.attn']]\n")
    config = FitConfig.from_file(tmp_path / "a.toml")
    assert config.steps == 9 and config.site_map == (("0.attn", "1.attn"),)


def test_a_file_that_cannot_be_read_is_refused_by_its_name_or_its_setting(tmp_path):
    (tmp_path / "bad.toml").write_text("steps = = 9")
    with pytest.raises(ValueError, match=r"bad.toml is not valid TOML"):
        FitConfig.from_file(tmp_path / "bad.toml")
    (tmp_path / "odd.toml").write_text("[fit]\nbatchsize = 9")
    with pytest.raises(ValueError, match=r"batchsize=9 is not a setting"):
        FitConfig.from_file(tmp_path / "odd.toml")


def test_recorded_settings_are_plain_values_without_the_folder_and_the_reporting(tmp_path):
    config = FitConfig(output_dir=tmp_path, resume=True, report_to="wandb", progress=False, sites=("0.attn",))
    recorded = config.recorded()
    assert set(FitConfig.model_fields) - set(recorded) == {"output_dir", "resume", "report_to", "progress"}
    assert recorded["sites"] == ["0.attn"] and recorded == FitConfig(sites=("0.attn",)).recorded()
