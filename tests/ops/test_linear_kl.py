import pytest
import torch
import torch.nn.functional as F

from bridges.ops.linear_kl import linear_kl, linear_kl_eager


def tensors(n=11, d=5, v=7, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, d), (v, d), (v,), (n, v)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def value_and_gradients(function, inputs, wanted, upstream=0.3, **options):
    x, weight, bias, target = (tensor.clone() for tensor in inputs)
    leaves = [leaf.requires_grad_() for leaf, wants in zip((x, weight, bias), wanted, strict=True) if wants]
    value = function(x, weight, bias, target, **options)
    return value.detach(), torch.autograd.grad(upstream * value, leaves)


@pytest.mark.parametrize("chunk", [1, 4, 11, 128])
@pytest.mark.parametrize("wanted", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_values_and_gradients_in_float64(chunk, wanted):
    value, gradients = value_and_gradients(linear_kl, tensors(), wanted, chunk=chunk)
    expected, expected_gradients = value_and_gradients(linear_kl_eager, tensors(), wanted)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-12, atol=1e-12)


def test_without_bias():
    x, weight, _, target = tensors()
    x.requires_grad_()
    zero = torch.zeros(7, dtype=torch.float64)
    torch.testing.assert_close(linear_kl(x, weight, None, target), linear_kl_eager(x, weight, zero, target))
    torch.testing.assert_close(linear_kl_eager(x, weight, None, target), linear_kl_eager(x, weight, zero, target))


def test_gradcheck():
    x, weight, bias, target = tensors(n=4, d=3, v=5)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *given: linear_kl(*given, target, chunk=3), leaves)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3), (torch.float32, 1e-6)])
def test_low_precision_sums_in_float32(dtype, tolerance):
    inputs = tensors(n=300, d=16, v=40, dtype=dtype)
    value, gradients = value_and_gradients(linear_kl, inputs, (1, 1, 1), upstream=1.0)
    x, weight, bias, target = inputs
    exact = linear_kl_eager(*(tensor.double() for tensor in inputs))
    assert value.dtype == torch.float32 and {gradient.dtype for gradient in gradients} == {dtype}
    assert value.item() == pytest.approx(exact.item(), rel=tolerance)
    raised = linear_kl_eager(F.linear(x, weight, bias).double(), torch.eye(40).double(), None, target.double())
    assert value.item() == pytest.approx(raised.item(), rel=1e-5)  # rounded logits are the only loss
    _, exact_gradients = value_and_gradients(linear_kl, [t.double() for t in inputs], (1, 1, 1), upstream=1.0)
    for gradient, expected in zip(gradients, exact_gradients, strict=True):
        assert (gradient - expected).norm() <= tolerance * expected.norm()


def test_no_gradient_reaches_the_target_and_none_is_recorded_without_grad():
    x, weight, bias, target = tensors()
    assert not linear_kl(x, weight, bias, target.requires_grad_()).requires_grad
    with torch.no_grad():
        assert not linear_kl(x.requires_grad_(), weight, bias, target).requires_grad


def test_no_rows():
    value, (gradient, _, _) = value_and_gradients(linear_kl, tensors(n=0), (1, 1, 1))
    assert value == 0 and gradient.shape == (0, 5)


def test_chunk_is_named():
    with pytest.raises(ValueError, match="chunk"):
        linear_kl(*tensors(), chunk=0)
