"""Gradient steps between standardised streams: the chain rule, the fold, and that scales do not matter."""

import pytest
import torch

from bridges.bridge import Bridge, BridgeSet
from bridges.fitting import standardized
from bridges.fitting.ridge import Standardization
from bridges.fitting.standardized import StandardizedBridges, standardizations_from

D, S = 3, 5


def made(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def side(width):
        return Standardization(
            torch.randn(width, generator=generator).double() * 10,
            torch.rand(width, generator=generator).double() * 5 + 0.1,
        )

    bridge = Bridge(D, S, k=S, dtype=torch.float64)
    bridge.randomize(generator)
    return BridgeSet([("0.attn", "0.attn")], [bridge]), [(side(D), side(S))], generator


def standardised_loss(bridge, dense, sparse, own, h):
    """A loss written with the standardised maps themselves."""
    weight, bias = own
    z = sparse.mean + sparse.std * (((h - dense.mean) / dense.std) @ weight.T + bias)
    return (z.square() * torch.arange(1.0, S + 1)).sum()


def test_gradients_are_those_of_the_standardised_maps_by_autograd():
    bridge_set, standardizations, generator = made()
    maps, h = StandardizedBridges(bridge_set, standardizations), torch.randn(7, D, generator=generator).double() * 9
    bridge = bridge_set[0]
    (bridge.encode(h).square() * torch.arange(1.0, S + 1)).sum().backward()
    maps.pull_gradients()
    encoder = [p for p in parameters(maps) if p.shape in ((S, D), (S,))]
    own = [p.detach().clone().requires_grad_() for p in encoder]
    expected = torch.autograd.grad(standardised_loss(bridge, *standardizations[0], own, h), own)
    for one, other in zip(encoder, expected, strict=True):
        torch.testing.assert_close(one.grad, other, rtol=1e-10, atol=1e-10)
    decoder = [p for p in parameters(maps) if p.shape in ((D, S), (D,))]
    assert len(decoder) == 2 and not any(p.grad.any() for p in decoder)  # no loss reaches it


def parameters(maps):
    return sorted(
        (p for group in maps.parameter_groups(1.0) for p in group["params"]), key=lambda p: (p.ndim == 1, p.shape)
    )


def test_folding_gives_back_what_was_unfolded():
    bridge_set, standardizations, _ = made()
    before = {name: p.detach().clone() for name, p in bridge_set.named_parameters()}
    StandardizedBridges(bridge_set, standardizations).fold()
    for name, p in bridge_set.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=1e-12, atol=1e-12)


def test_without_standardisation_the_maps_are_the_plain_ones_bit_for_bit():
    bridge_set, _, _ = made()
    before = {name: p.detach().clone() for name, p in bridge_set.named_parameters()}
    maps = StandardizedBridges(bridge_set)
    maps.fold()
    assert all(torch.equal(p, before[name]) for name, p in bridge_set.named_parameters())
    for p in bridge_set.parameters():
        p.grad = torch.randn_like(p)
    maps.pull_gradients()
    given = sorted(bridge_set.parameters(), key=lambda p: (p.ndim == 1, p.shape))
    for one, other in zip(parameters(maps), given, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_a_step_changes_what_is_predicted_alike_whatever_the_streams_scales(scale):
    """Both streams in other units: the maps' predictions after a step are the same, in those units."""
    predictions = []
    for unit in (1.0, scale):
        bridge_set, ((dense, sparse),), generator = made()
        h = torch.randn(7, D, generator=generator).double()
        units = (
            Standardization(dense.mean * unit, dense.std * unit),
            Standardization(sparse.mean * unit, sparse.std * unit),
        )
        bridge = bridge_set[0]
        with torch.no_grad():
            bridge.encoder_bias *= unit
        maps = StandardizedBridges(bridge_set, [units])
        optimizer = torch.optim.AdamW(maps.parameter_groups(0.1), weight_decay=0.0)
        (bridge.encode(h * unit) / unit - 1).square().sum().backward()
        maps.pull_gradients()
        optimizer.step()
        maps.fold()
        predictions.append(bridge.encode(h * unit).detach() / unit)
    torch.testing.assert_close(*predictions, rtol=1e-6, atol=1e-8)


def test_a_weights_learning_rate_falls_with_the_width_of_its_input(monkeypatch):
    bridge_set, standardizations, _ = made()
    monkeypatch.setattr(standardized, "LR_WIDTH", 4)
    rates = {
        tuple(p.shape): group["lr"]
        for group in StandardizedBridges(bridge_set, standardizations).parameter_groups(0.5)
        for p in group["params"]
    }
    assert rates == {(S, D): 0.5, (D, S): 0.5 * 4 / 5, (S,): 0.5, (D,): 0.5}


def test_a_checkpoint_gives_the_standardised_maps_back_bit_for_bit():
    bridge_set, standardizations, _ = made()
    maps = StandardizedBridges(bridge_set, standardizations)
    with torch.no_grad():
        for p in parameters(maps):
            p.add_(torch.rand_like(p))
    maps.fold()
    tensors = {name: t.clone() for name, t in maps.tensors().items()}
    again = StandardizedBridges(bridge_set, standardizations_from(tensors, 1, torch.device("cpu")))
    again.load(tensors)
    assert all(torch.equal(one, other) for one, other in zip(parameters(again), parameters(maps), strict=True))


def test_random_maps_are_taken_as_standardised_ones():
    bridge_set, ((dense, sparse),), generator = made()
    weight = bridge_set[0].encoder_weight.detach().clone()
    StandardizedBridges(bridge_set, [(dense, sparse)], standardized=True).fold()
    h = dense.mean + dense.std * torch.randn(2000, D, generator=generator).double()
    z = (bridge_set[0].encode(h) - sparse.mean) / sparse.std
    torch.testing.assert_close(z, ((h - dense.mean) / dense.std) @ weight.T, rtol=1e-9, atol=1e-9)
