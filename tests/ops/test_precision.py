import pytest
import torch

from bridges.ops.precision import full_precision


@pytest.fixture(autouse=True)
def as_before():
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("allowed", ["high", "medium", "highest"])
def test_the_setting_is_the_highest_inside_and_as_before_afterwards(allowed):
    torch.set_float32_matmul_precision(allowed)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(KeyError), torch.autocast("cpu", torch.bfloat16), full_precision("cpu"):
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32
        assert not torch.is_autocast_enabled("cpu")
        raise KeyError
    assert torch.get_float32_matmul_precision() == allowed and torch.backends.cuda.matmul.allow_tf32 == tf32


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
@pytest.mark.parametrize("backend", ["cuda", "mkldnn"])
def test_a_backend_that_was_set_by_itself_is_given_its_setting_back(backend):
    matmul = getattr(torch.backends, backend).matmul
    matmul.fp32_precision = "tf32"
    with full_precision("cpu"):
        assert matmul.fp32_precision == "ieee"
    assert matmul.fp32_precision == "tf32"
