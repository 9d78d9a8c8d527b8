"""A launcher's mixed precision, and torch's precision of float32 products, which is left as it was found."""

from argparse import Namespace

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from bridges.config import FitConfig
from bridges.fitting.precision import LAUNCHER_VARIABLE, float32_products, refuse_other_mixed_precision
from bridges.sparsity.settings import PretrainConfig

BACKENDS = torch.backends


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


def reading(read):
    """What torch tells of a setting; None where it refuses to."""
    try:
        return read()
    except RuntimeError:
        return None


def settings():
    """Torch's precision of float32 products by name, and where torch has them the settings of each library."""
    found = [reading(torch.get_float32_matmul_precision)]
    modules = (BACKENDS, BACKENDS.cuda.matmul, BACKENDS.mkldnn, getattr(BACKENDS.mkldnn, "matmul", None))
    return found + [module.fp32_precision for module in modules if hasattr(module, "fp32_precision")]


@pytest.fixture
def torchs_settings():
    """Torch's settings go back to those of a new process after the test."""
    yield
    torch.set_float32_matmul_precision("highest")
    for module in (BACKENDS, BACKENDS.mkldnn, BACKENDS.mkldnn.matmul, BACKENDS.cuda.matmul):
        module.fp32_precision = "none"


GLOBAL = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "one library": lambda: setattr(BACKENDS.mkldnn.matmul, "fp32_precision", "bf16"),
    "one GPU library": lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "all libraries": lambda: setattr(BACKENDS, "fp32_precision", "tf32"),
}


@pytest.mark.parametrize("ending", ["success", "an error"])
@pytest.mark.parametrize("precision", ["highest", "high", "medium", None])
@pytest.mark.parametrize("user", GLOBAL)
def test_torchs_settings_are_left_as_the_user_made_them(torchs_settings, user, precision, ending):
    GLOBAL[user]()
    before = settings()
    try:
        with float32_products(precision) as used:
            assert used == reading(torch.get_float32_matmul_precision) == (precision or before[0])
            if precision is None:
                assert settings() == before
            if ending == "an error":
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert ending == "an error"
    assert settings() == before


def test_libraries_that_followed_a_common_setting_follow_it_still(torchs_settings):
    BACKENDS.fp32_precision = "tf32"
    with float32_products("medium"):
        assert BACKENDS.mkldnn.matmul.fp32_precision == "bf16"
    BACKENDS.fp32_precision = "ieee"
    assert BACKENDS.mkldnn.matmul.fp32_precision == BACKENDS.cuda.matmul.fp32_precision == "ieee"


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_a_product_is_as_exact_as_the_docstring_says(precision):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(64, 64, generator=generator) for _ in range(2))  # positive, so that no sum cancels
    bound = {"highest": 1e-6, "high": 2 * 5e-4, "medium": 2 * 4e-3}[precision]
    with float32_products(precision):
        torch.testing.assert_close((x @ y).double(), x.double() @ y.double(), rtol=bound, atol=0)
