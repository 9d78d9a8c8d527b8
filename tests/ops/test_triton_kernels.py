"""Triton's kernels through its interpreter (triton_interpreted.py), and compiled for a GPU; on a GPU: tests/gpu."""

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from several_processes import TESTS

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which has no build for this system")


@pytest.mark.slow(40)
def test_the_kernels_are_their_eager_twins_through_the_interpreter():
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, str(Path(__file__).with_name("triton_interpreted.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert outcomes and not any(outcomes.values()), "\n".join(outcomes.values())


def kernels(bits, wide):
    """The kernels on floats whose bits are such integers, with the types of their arguments or their fixed values.

    `wide`: the integer that keys are compared as.
    """
    limits, row = {"infinity": wide, "sign_free": wide}, {"bits": f"*{bits}", "mask": "*i1", "values": f"*{bits}"}
    long, blocks = {"bits": f"*{bits}", "state": "*i64"}, {"d": "i32", "blocks": "i32", **limits}
    digits = {"d": "i32", "programs": "i32", "shift": "i32", **limits, "first": False, "bits_of_digit": 11, "steps": 3}
    ties, written = {"ties": "*i32"}, {"mask": "*i1", "values": f"*{bits}"}
    return {
        "triton_kernels._select_row_kernel": {**row, "d": "i32", "k": "i32", **limits, "with_values": 1, "block": 4096},
        "triton_kernels._copy_masked_kernel": {"bits": f"*{bits}", "mask": "*i1", "out": f"*{bits}", "size": "i32"},
        "triton_long_rows._count_digits_kernel": {**long, "counts": "*i32", **digits},
        "triton_long_rows._choose_digit_kernel": {
            "state": "*i64",
            "counts": "*i32",
            "shift": "i32",
            "bits_of_digit": 11,
        },
        "triton_long_rows._count_ties_kernel": {**long, **ties, **blocks},
        "triton_long_rows._write_mask_kernel": {
            **{**long, "ties_up_to": "*i64", **ties, **written, **blocks, "with_values": 1}
        },
    }


def divergence(logits, wide):
    """`kernels` for the one of the divergence."""
    import triton.language as tl

    rows, figures = dict.fromkeys(("target", "logits"), f"*{logits}"), dict.fromkeys(("kl", "normalizer"), f"*{wide}")
    sizes = dict.fromkeys(("width", "target_step", "logits_step", "gradient_step"), "i32")
    fixed = {"with_gradient": 1, "dtype": {"fp32": tl.float32, "fp64": tl.float64}[wide], "blocks": 9}
    return {"triton_kl._kl_row_kernel": {**rows, **figures, "gradient": f"*{logits}", **sizes, **fixed}}


@pytest.mark.slow(30)
@pytest.mark.parametrize(
    "types", [("i16", "i32", "bf16", "fp32"), ("i32", "i32", "fp32", "fp32"), ("i64", "i64", "fp64", "fp64")]
)
def test_every_kernel_compiles_for_a_gpu(types):
    """The interpreter accepts what the compiler refuses, such as types that a branch or a loop changes."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for name, arguments in (kernels(*types[:2]) | divergence(*types[2:])).items():
        module, kernel = name.split(".")
        function = getattr(import_module(f"bridges.ops.{module}"), kernel)
        values = {name: arguments.get(name, 4096) for name in function.arg_names}
        fixed = {(i,): value for i, value in enumerate(values.values()) if not isinstance(value, str)}
        signature = {name: value if isinstance(value, str) else "constexpr" for name, value in values.items()}
        found = compile_kernel(ASTSource(function, signature, fixed), target=GPUTarget("cuda", 90, 32))
        assert "ptx" in found.asm, name
