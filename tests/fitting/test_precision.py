"""A launcher may not name another mixed precision than the settings of a run."""

from argparse import Namespace

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from bridges.config import FitConfig
from bridges.fitting.precision import LAUNCHER_VARIABLE, refuse_other_mixed_precision
from bridges.sparsity.settings import PretrainConfig


def launched(*arguments):
    """The variable as `accelerate launch` sets it."""
    options = ["--num_processes", "1", "--num_machines", "1", "--num_cpu_threads_per_process", "1"]
    options += ["--dynamo_backend", "no", *arguments, "script.py"]
    given = launch_command_parser().parse_args(options, Namespace(use_cpu=True))
    return prepare_simple_launcher_cmd_env(given)[1][LAUNCHER_VARIABLE]


@pytest.mark.parametrize("config", [FitConfig, PretrainConfig])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_launcher_that_names_no_precision_or_the_settings_own_is_accepted(monkeypatch, config, precision):
    for value in (None, "", "no", "NO", precision, launched("--mixed_precision", precision)):
        monkeypatch.delenv(LAUNCHER_VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(LAUNCHER_VARIABLE, value)
        refuse_other_mixed_precision(config(mixed_precision=precision))


@pytest.mark.parametrize("config", [FitConfig, PretrainConfig])
def test_a_launcher_that_names_another_precision_is_refused_with_both_and_the_remedy(monkeypatch, config):
    monkeypatch.setenv(LAUNCHER_VARIABLE, launched("--mixed_precision", "bf16"))
    with pytest.raises(ValueError) as refused:
        refuse_other_mixed_precision(config())
    assert "\n" not in str(refused.value) and str(refused.value) == (
        "ACCELERATE_MIXED_PRECISION='bf16', by the launcher or its configuration, differs from mixed_precision='no' of "
        f'{config.verb}, which counts; set mixed_precision="bf16" in the settings of {config.verb}, or start the '
        "launcher with --mixed_precision no"
    )


@pytest.mark.parametrize(("config", "value"), [(FitConfig, "fp8"), (PretrainConfig, "fp16")])
def test_a_precision_that_is_no_setting_is_not_recommended(monkeypatch, config, value):
    monkeypatch.setenv(LAUNCHER_VARIABLE, value)
    with pytest.raises(ValueError, match=r"which counts; start the launcher with --mixed_precision no$"):
        refuse_other_mixed_precision(config(mixed_precision="bf16"))
