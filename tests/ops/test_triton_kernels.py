"""The Triton twin of AbsTopK through Triton's interpreter; on a GPU: tests/gpu.

In a process of its own, since the interpreter is chosen when Triton is imported.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which has no build for this system")

PROGRAM = """
import torch
from bridges.ops.abs_topk import _BITS, abs_topk_mask_eager
from bridges.ops.triton_kernels import topk_mask

generator = torch.Generator().manual_seed(0)
for dtype, bits in _BITS.items():
    for n, d, k in [(1, 2, 1), (3, 33, 32), (3, 64, 16), (3, 129, 1), (3, 7, 3), (0, 5, 2)]:
        x = torch.randn(n, d, generator=generator, dtype=torch.float64)
        special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 5e-324])
        with_special = torch.where(x > 0.5, special[torch.randint(6, x.shape, generator=generator)], x)
        for rows in (x, (1.5 * x).round(), with_special):
            rows = rows.to(dtype)
            found = topk_mask(rows.view(bits.dtype), k, bits.infinity)
            assert torch.equal(found, abs_topk_mask_eager(rows, k)), (dtype, n, d, k)
print("equal")
"""


def test_the_kernel_keeps_what_its_eager_twin_keeps():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr
