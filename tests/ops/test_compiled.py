import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from bridges.ops.compiled import compiled

needs_numba = pytest.mark.skipif(find_spec("numba") is None, reason="needs numba")

PROBLEM = """
import os
from threading import Thread

import torch
from bridges.ops.sparse_linear import NonzeroPattern, sparse_linear

torch.set_num_threads(1)  # torch's own threads do not survive a fork either
torch.manual_seed(0)
weight = torch.randn(90, 70) * (torch.rand(90, 70) < 0.1)
pattern = NonzeroPattern.from_mask(weight != 0)
values, x = weight.flatten()[pattern.flat], torch.randn(500, 70)
expected = x @ weight.T

def is_right():
    return torch.allclose(sparse_linear(x, values, pattern), expected, atol=1e-4)
"""


def run(code, layer="default"):
    """Run code in a process of its own, because numba's threads may end it."""
    environment = os.environ | {"NUMBA_NUM_THREADS": "2", "NUMBA_THREADING_LAYER": layer}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@needs_numba
@pytest.mark.slow
def test_importing_the_package_does_not_import_numba():
    run("import sys, bridges, bridges.ops.sparse_linear; assert 'numba' not in sys.modules")


@needs_numba
@pytest.mark.slow
def test_two_threads_may_multiply_at_once_under_the_workqueue_layer():
    code = """
right = []
threads = [Thread(target=lambda: right.extend(is_right() for _ in range(300))) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
import numba
assert numba.threading_layer() == "workqueue" and right == [True] * 600
"""
    run(PROBLEM + code, "workqueue")


@needs_numba
@pytest.mark.slow
def test_the_number_of_threads_changes_no_bit():
    code = """
one = sparse_linear(x, values, pattern)
torch.set_num_threads(2)
assert torch.equal(sparse_linear(x, values, pattern), one) and torch.get_num_threads() == 2
"""
    run(PROBLEM + code, "omp")


@needs_numba
@pytest.mark.slow
def test_the_first_kernel_leaves_torch_its_number_of_threads():
    run(PROBLEM + "assert is_right() and torch.get_num_threads() == 1", "omp")


@needs_numba
@pytest.mark.slow
@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_a_process_forked_after_a_parallel_kernel_ran_multiplies_on_one_thread(layer):
    code = """
assert is_right()
child = os.fork()
if child == 0:
    os._exit(0 if is_right() else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert is_right()
"""
    run(PROBLEM + code, layer)


@needs_numba
@pytest.mark.slow
def test_a_forked_process_with_more_threads_gets_an_error_and_not_a_deadlock():
    code = """
torch.set_num_threads(2)
assert is_right()
child = os.fork()
if child == 0:
    try:
        is_right()
    except RuntimeError as error:
        os._exit(0 if "spawn" in str(error) else 4)
    os._exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    run(PROBLEM + code, "omp")


@needs_numba
def test_kernels_are_compiled_where_no_folder_is_writable(monkeypatch):
    """Numba refuses to cache there; the compiled code then lives as long as the process."""
    import numba

    def refuse(cache=False, njit=numba.njit, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    def double(x, out):
        for i in range(x.size):
            out[i] = 2 * x[i]

    with monkeypatch.context() as patch:
        patch.setattr(numba, "njit", refuse)
        kernel = compiled(double)
    doubled = np.empty(3)
    kernel(np.array([1.0, 2.0, 4.0]), doubled)
    assert doubled.tolist() == [2, 4, 8]
