import pytest
import torch

from bridges.models.sparse.blocks import Attention, attention_pattern
from bridges.models.sparse.config import SparseConfig
from bridges.ops.causal_attention import causal_attention, causal_attention_eager, has_fused_attention


def inputs(seq, d_head=4, dtype=torch.float64, seed=0, heads=3):
    generator = torch.Generator().manual_seed(seed)
    qkv = [torch.randn(2, heads, seq, d_head, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]
    return *qkv, (3 * torch.randn(heads, generator=generator, dtype=dtype)).requires_grad_()


@pytest.mark.parametrize("seq", [1, 2, 7, 40, 600])
@pytest.mark.parametrize("d_head", [1, 3, 16])
def test_values_and_gradients_are_those_of_the_definition(seq, d_head):
    leaves = inputs(seq, d_head)
    grad = torch.randn(2, 3, seq, d_head, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outs = [f(*leaves) for f in (causal_attention, causal_attention_eager)]
    torch.testing.assert_close(*outs, rtol=1e-11, atol=1e-12)
    for one, other in zip(*(torch.autograd.grad(out, leaves, grad) for out in outs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("strided", ["q", "k", "v", "all"])
def test_any_memory_layout(strided):
    leaves = inputs(8, 6)
    turned = [x.mT.contiguous().mT if strided in (name, "all") else x for name, x in zip("qkv", leaves, strict=False)]
    outs = [f(*turned, leaves[3]) for f in (causal_attention, causal_attention_eager)]
    torch.testing.assert_close(*outs, rtol=1e-11, atol=1e-12)
    for one, other in zip(*(torch.autograd.grad(out.cos().sum(), leaves) for out in outs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("with_sink", [True, False])
def test_gradients_can_be_differentiated_again(with_sink):
    q, k, v, sink = inputs(5)
    leaves = (q, k, v, sink) if with_sink else (q, k, v)
    assert torch.autograd.gradgradcheck(causal_attention, leaves)


def test_gradients_in_float32():
    leaves = inputs(30, 16, torch.float32)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    found = torch.autograd.grad(causal_attention(*leaves).sin().sum(), leaves)
    exact = torch.autograd.grad(causal_attention_eager(*wide).sin().sum(), wide)
    for one, other in zip(found, exact, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_without_a_sink():
    leaves = inputs(9)[:3]
    outs = [f(*leaves) for f in (causal_attention, causal_attention_eager)]
    torch.testing.assert_close(*outs, rtol=1e-11, atol=1e-12)
    for one, other in zip(*(torch.autograd.grad(out.sin().sum(), leaves) for out in outs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_a_sink_that_takes_nothing_or_everything_stays_finite(logit):
    q, k, v, _ = inputs(12, dtype=torch.float32)
    sink = torch.full((3,), logit, requires_grad=True)
    out = causal_attention(q, k, v, sink)
    torch.testing.assert_close(out, causal_attention_eager(q, k, v, sink), rtol=1e-5, atol=1e-6)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, k, v, sink)))


def attention_layer(**options):
    torch.manual_seed(0)
    layer = Attention(SparseConfig(d_model=12, n_head=2, d_head=4, d_mlp=8, block_size=16, n_layer=1, **options), 0)
    return layer.double().eval()


@pytest.mark.parametrize("sink", [True, False])
def test_a_layer_gives_what_its_matrix_of_weights_gives(sink):
    layer, x = attention_layer(sink=sink), torch.randn(2, 7, 12, dtype=torch.float64)
    causal = attention_pattern(7, 0, None, x.device)
    by_weights = layer(x, causal.expand(2, -1, -1, -1))  # one pattern a row: not taken as causal
    torch.testing.assert_close(layer(x, causal), by_weights, rtol=1e-11, atol=1e-13)


def test_padding_and_dropout_take_the_matrix_of_weights(monkeypatch):
    layer, x = attention_layer(dropout=0.5), torch.randn(1, 5, 12, dtype=torch.float64)
    used = []
    monkeypatch.setattr(type(layer), "weights", lambda self, q, k, allowed: used.append(1) or q @ k.mT)
    padded = attention_pattern(5, 0, torch.tensor([[0, 1, 1, 1, 1]]), x.device)
    layer(x, padded)
    assert len(used) == 1
    layer(x, attention_pattern(5, 0, None, x.device))
    assert len(used) == 1
    layer.train()(x, attention_pattern(5, 0, None, x.device))
    assert len(used) == 2
    q = torch.randn(1, 2, 1, 4)
    assert not has_fused_attention(q, torch.randn(1, 2, 3, 4))  # one query, three cached keys
    assert not has_fused_attention(q.half(), q.half())
