"""Triton's kernels through its interpreter, against their eager twins; run by test_triton_kernels.py.

A script, since the interpreter is chosen when Triton is imported. It prints as JSON how each check has ended.
"""

import json
import sys
import traceback
from contextlib import contextmanager
from unittest.mock import patch

import torch

from bridges.ops import abs_topk, kl, triton_kernels, triton_kl, triton_long_rows
from bridges.ops.abs_topk import _BITS, abs_topk_eager, abs_topk_mask_eager, apply_mask
from bridges.ops.kl import kl_divergence_eager, row_divergence
from bridges.ops.triton_kl import kl_and_gradient
from bridges.sparsity.projection import largest

INF, NAN = float("inf"), float("nan")
SHAPES = [(1, 2, 1), (1, 33, 32), (2, 64, 16), (1, 129, 1), (3, 7, 3), (0, 5, 2)]


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hard_rows(n, d):
    """Rows without ties, with many, with zeros, infinities, NaN and the smallest numbers, and all alike."""
    x = seeded(n, d, seed=d)
    special = torch.tensor([0.0, -0.0, INF, -INF, NAN, -NAN, 5e-324])
    chosen = special[torch.randint(len(special), x.shape, generator=torch.Generator().manual_seed(n))]
    return [x, (1.5 * x).round(), torch.where(x > 0.5, chosen, x), torch.full_like(x, -2.0), torch.where(x > 1, x, 0)]


def same_bits(one, other):
    """Equal bit for bit: NaN equals itself, 0 and -0 differ."""
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def assert_selects(select, x, k):
    """The mask, and the values with it."""
    bits = x.view(_BITS[x.dtype].dtype)
    mask, values = torch.zeros(x.shape, dtype=torch.bool), torch.full_like(x, 7.0)
    select(bits, k, _BITS[x.dtype].infinity, mask, values.view(bits.dtype))
    expected = abs_topk_mask_eager(x, k)
    assert torch.equal(mask, expected), (x.dtype, x.shape, k)
    assert same_bits(values, torch.where(expected, x, 0)), (x.dtype, x.shape, k)


def short_rows_keep_what_the_eager_twin_keeps():
    for dtype in _BITS:
        for n, d, k in SHAPES:
            for rows in hard_rows(n, d):
                assert_selects(triton_kernels.topk_mask, rows.to(dtype), k)


@contextmanager
def small_programs(width=16_384):
    """Short blocks and digits, so that a short row has many of each; the interpreter is slow."""
    with (
        patch.multiple(triton_long_rows, _BLOCK=32, _DIGIT_BITS=7, _MAX_COUNTING_PROGRAMS=3),
        patch.object(triton_kernels, "MAX_WIDTH", width),
    ):
        yield


def long_rows_keep_what_the_eager_twin_keeps():
    with small_programs():
        for dtype in _BITS:
            for n, d, ks in [(1, 200, (1, 101)), (2, 64, (63,)), (1, 2, (1,)), (0, 300, (5,))]:
                for rows in hard_rows(n, d):
                    for k in ks:
                        assert_selects(triton_long_rows.topk_mask_long, rows.to(dtype), k)


def rows_beyond_one_program_are_long_rows():
    """At the sizes that a GPU uses."""
    for dtype, k in ((torch.float32, 4000), (torch.bfloat16, triton_kernels.MAX_WIDTH)):
        assert_selects(triton_kernels.topk_mask, seeded(1, triton_kernels.MAX_WIDTH + 5).to(dtype), k)


def masks_are_applied_bit_for_bit():
    for dtype in _BITS:
        for rows in hard_rows(3, 1500):
            x = rows.to(dtype)
            for mask in (x > 0, torch.zeros_like(x, dtype=torch.bool), torch.ones_like(x, dtype=torch.bool)):
                assert same_bits(apply_mask(x, mask), torch.where(mask, x, 0))
    x = seeded(6, 4).T  # not contiguous
    assert same_bits(apply_mask(x, x > 0), torch.where(x > 0, x, 0).contiguous())
    assert apply_mask(x[:0], x[:0] > 0).shape == (0, 6)


def abs_topk_and_its_gradients_are_those_of_the_eager_twin():
    for shape in [(3, 10), (2, 1, 9), (11,), (0, 8)]:
        base, upstream = seeded(*shape), seeded(*shape, seed=1)
        results = []
        for function in (abs_topk.abs_topk, abs_topk_eager):
            x = base.clone().requires_grad_()
            kept = function(x, 4)
            (first,) = torch.autograd.grad((kept**3 * upstream).sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), x)
            results.append((kept.detach(), first.detach(), second))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other), shape
    x = seeded(3, 8).requires_grad_()
    abs_topk.abs_topk(2 * x, 3).add_(1.0).sum().backward()  # the result may be changed in place, as any other
    assert torch.equal(x.grad, 2.0 * abs_topk_mask_eager(x, 3))


def whole_weights_are_projected_as_by_the_eager_twin():
    """With the fewest entries that every channel keeps, in both dimensions."""
    weight = (2 * seeded(16, 30)).round().float()
    for dim, fewest in ((None, 0), (0, 4), (1, 2)):
        with small_programs(width=64):
            found = largest(weight, 100, dim, fewest)
        with patch.object(abs_topk, "has_triton_kernel", lambda x: False):
            assert torch.equal(found, largest(weight, 100, dim, fewest)), dim


def divergences_are_those_of_the_eager_twin():
    for dtype, other, tolerance in [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.bfloat16, 1e-5),
        (torch.float16, torch.float32, 1e-5),
        (torch.float32, torch.float64, 1e-12),
    ]:
        for n, width in [(1, 1), (3, 7), (2, 4097), (1, 9000), (0, 5)]:
            target, logits = 3 * seeded(n, width).to(dtype), 3 * seeded(n, width, seed=1).to(other)
            gradient = torch.full_like(logits, 7.0)
            kl, normalizer = kl_and_gradient(target, logits, gradient)
            exact = row_divergence(target.double(), logits.double())
            assert kl.dtype == torch.promote_types(torch.promote_types(dtype, other), torch.float32)
            torch.testing.assert_close(kl.double(), exact.kl, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(normalizer.double(), exact.log_normalizer, rtol=tolerance, atol=tolerance)
            leaf = logits.double().requires_grad_()
            kl_divergence_eager(target.double(), leaf).backward()
            rounding = max(tolerance, torch.finfo(other).eps)
            torch.testing.assert_close(gradient.double(), leaf.grad, rtol=rounding, atol=tolerance)
            alone = kl_and_gradient(target, logits)
            assert torch.equal(alone[0], kl) and torch.equal(alone[1], normalizer)
            wide = torch.cat([logits, logits], 1)[:, :width]  # rows that do not follow one another in memory
            kl_and_gradient(target, wide, wide)
            assert torch.equal(wide, gradient)


def divergences_without_a_probability_are_those_of_the_eager_twin():
    """Logits of -inf in the target, in the logits or in both, whole rows of them, infinities and NaN."""
    target, logits = seeded(8, 5000), seeded(8, 5000, seed=1)
    target[0, :4100], logits[1, 7], target[2, 8], logits[2, 8] = -INF, -INF, -INF, -INF
    target[3], logits[4], target[5, 4999], logits[6, 0], target[7, 2], logits[7, 4998] = -INF, -INF, INF, INF, NAN, NAN
    leaf = logits.clone().requires_grad_()
    exact = row_divergence(target, leaf)
    kl_divergence_eager(target, leaf).backward()
    gradient = torch.empty_like(logits)
    kl, normalizer = kl_and_gradient(target, logits, gradient)
    torch.testing.assert_close(kl, exact.kl, equal_nan=True)
    torch.testing.assert_close(normalizer[:6], exact.log_normalizer[:6], equal_nan=True)
    assert kl[:2].isfinite().tolist() == [True, False] and kl[2].isfinite()
    rows = [0, 1, 2, 5, 6, 7]
    torch.testing.assert_close(gradient[rows].isnan(), (logits.softmax(-1) - target.softmax(-1))[rows].isnan())
    torch.testing.assert_close(gradient[:3], (logits.softmax(-1) - target.softmax(-1))[:3])


def losses_go_through_the_kernel():
    target, logits = (torch.randn(3, 50, dtype=torch.float64, requires_grad=True) for _ in range(2))
    # Inside alone: the other checks hold the kernel against the eager code of these functions.
    with (
        patch.object(kl, "has_triton_kernel", lambda x: True),
        patch.object(triton_kl, "kl_and_gradient", wraps=kl_and_gradient) as kernel,
    ):
        kl.kl_divergence(target, logits).backward()
        rows = row_divergence(target, logits)
    assert kernel.call_count == 2
    found, logits.grad = logits.grad, None
    exact = kl_divergence_eager(target, logits)
    exact.backward()
    torch.testing.assert_close(found, logits.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(rows.kl.sum(), exact.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(rows.log_normalizer, logits.detach().logsumexp(-1), rtol=1e-10, atol=1e-12)


CHECKS = (
    losses_go_through_the_kernel,
    short_rows_keep_what_the_eager_twin_keeps,
    long_rows_keep_what_the_eager_twin_keeps,
    rows_beyond_one_program_are_long_rows,
    masks_are_applied_bit_for_bit,
    abs_topk_and_its_gradients_are_those_of_the_eager_twin,
    whole_weights_are_projected_as_by_the_eager_twin,
    divergences_are_those_of_the_eager_twin,
    divergences_without_a_probability_are_those_of_the_eager_twin,
)

if __name__ == "__main__":
    abs_topk.has_triton_kernel = lambda x: True  # the interpreter computes on the CPU
    outcomes = {}
    for check in CHECKS:
        try:
            check()
            outcomes[check.__name__] = ""
        except Exception:  # whatever it is, the test that started this shows it
            outcomes[check.__name__] = traceback.format_exc()
    json.dump(outcomes, sys.stdout)
