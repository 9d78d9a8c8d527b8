"""The profile of a step: which part and kind of operation a time counts to, on a CPU and on made-up GPU events."""

import pytest
import torch
from measure_step import Case
from profile_step import OTHER, PYTHON, kind_of, main, print_tables, profile_steps
from step_pair import WITH_A_MOVE
from step_parts import PARTS, REST, SPAN, UNKNOWN, Spent, time_spent
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from bridges.fitting.trainer import Trainer
from bridges.models.residual import ResidualModel
from bridges.models.sparse.residual import SparseResidual
from bridges.objective import hybrid

SHAPE = {"layers": 1, "d_dense": 32, "d_sparse": 48, "vocab": 32, "density": 1 / 16}
OF_A_SPARSE_MODEL_THAT_TRAINS = {"backward of the sparse model", "projection or move"}


@pytest.mark.parametrize(("kind", "name"), [("projected", "ours"), ("moving support", WITH_A_MOVE), ("frozen", "ours")])
def test_every_part_of_a_step_is_in_its_profile_and_nothing_counts_twice(kind, name, capsys):
    replaced = hybrid.run_path_to_final, Trainer.train_step, ResidualModel.trace
    found = profile_steps(Case(kind, SHAPE, batch=2, seq=16), n_steps=1, name=name)
    assert (hybrid.run_path_to_final, Trainer.train_step, ResidualModel.trace) == replaced
    assert "trace" not in vars(SparseResidual)
    parts, kinds = found.by(lambda one: one.part), found.by(lambda one: kind_of(one.name))
    assert set(parts) == set(PARTS) - {UNKNOWN} - (OF_A_SPARSE_MODEL_THAT_TRAINS if kind == "frozen" else set())
    assert all(ms > 0 for ms, _ in parts.values())
    total = sum(one.microseconds for one in found.spent) / 1e3
    assert sum(ms for ms, _ in parts.values()) == pytest.approx(total)
    assert sum(ms for ms, _ in kinds.values()) == pytest.approx(total)
    assert {"dense products", "products with nonzeros", "AbsTopK", "fused attention", PYTHON} <= set(kinds)
    print_tables(found)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| tails")] == ["| tails of hybrid passes"]
    assert [line for line in lines if "share" in line] == [
        "| part of a step | ms | share | calls |",
        "| kind of operation | ms | share | calls |",
    ]
    shares = [int(line.split(" | ")[2].removesuffix("%")) for line in lines if "%" in line]
    assert abs(sum(shares) - 200) <= len(shares) / 2


def test_only_a_moving_support_is_profiled_with_moves(capsys):
    with pytest.raises(SystemExit):
        main(["--moves", "--kind", "frozen"])
    assert "--moves needs --kind 'moving support', not 'frozen'" in capsys.readouterr().err


def test_an_operation_counts_to_the_innermost_span_and_one_outside_to_the_rest():
    x = torch.ones(64, 64)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        x @ x
        with record_function(SPAN + "outer"):
            x @ x
            with record_function(SPAN + "inner"):
                x @ x
                x @ x
            x @ x
    events = profiler.events()
    spent = time_spent(events, on_gpu=False)
    assert [one.part for one in spent if one.name == "aten::mm"] == [REST, "outer", "inner", "inner", "outer"]
    assert sorted(one.part for one in spent if not one.name) == ["inner", "outer"]
    outermost = [e.cpu_time_total for e in events if e.cpu_parent is None]
    assert sum(one.microseconds for one in spent) == pytest.approx(sum(outermost))


def event(name, start, end, number=0, thread=1, gpu=False, annotation=False):
    device = DeviceType.CUDA if gpu else DeviceType.CPU
    made = FunctionEvent(
        number, name, thread, start, end, use_device="cuda", device_type=device, is_user_annotation=annotation
    )
    if name.startswith("aten::"):
        made.append_kernel("sgemm", 0, 30)  # what an operation tells of the kernel that it launches
    return made


def test_on_a_gpu_kernels_alone_count_once_and_to_the_part_that_launched_them():
    """A backward pass launches in another thread, a kernel runs later; operations and spans repeat its time."""
    events = [
        event(SPAN + "head and KL", 0, 100),
        event("aten::mm", 10, 12, number=7),  # a number of an operation, not of the launch below
        event("cuLaunchKernelEx", 20, 21, number=8),
        event(SPAN + "backward of head and KL", 40, 90),
        event("aten::mm", 50, 60, number=3, thread=2),
        event("cudaLaunchKernel", 55, 56, number=7, thread=2),
        event("cudaMemcpyAsync", 110, 111, number=9),
        event("sm90_xmma_gemm_f32f32", 200, 230, number=7, gpu=True),
        event("_kl_row", 300, 305, number=8, gpu=True),
        event("Memcpy HtoD (Pinned -> Device)", 310, 311, number=9, gpu=True),
        event("void at::native::vectorized_elementwise_kernel", 320, 322, number=10, gpu=True),
        event(SPAN + "head and KL", 200, 305, gpu=True, annotation=True),
    ]
    spent = time_spent(events, on_gpu=True)
    assert spent == [
        Spent("sm90_xmma_gemm_f32f32", "backward of head and KL", 30),
        Spent("_kl_row", "head and KL", 5),
        Spent("Memcpy HtoD (Pinned -> Device)", REST, 1),
        Spent("void at::native::vectorized_elementwise_kernel", UNKNOWN, 2),
    ]
    assert [kind_of(one.name) for one in spent] == ["dense products", "softmax, KL", "zeros and copies", OTHER]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_select_row", "AbsTopK"),
        ("_copy_masked", "AbsTopK"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", "dense products"),
        ("void gemv2T_kernel_val<int, int, float>", "dense products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "fused attention"),
        ("fmha_cutlassB_f32_aligned_64x64_k64_sm80", "fused attention"),
        ("_SparseLinearBackward", "products with nonzeros"),
        ("void at::native::elementwise_kernel<128, 2, direct_copy_kernel_cuda>", "zeros and copies"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimisers"),
        ("aten::mul", OTHER),
        ("", PYTHON),
    ],
)
def test_names_of_operations_and_of_kernels_tell_their_kind(name, kind):
    assert kind_of(name) == kind
