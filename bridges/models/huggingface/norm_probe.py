"""Measuring what the norm before a read does, by what it does to probe vectors: no norm class needs to be known."""

from __future__ import annotations

import torch
from torch import Tensor

from bridges.models.huggingface.decompose import difference
from bridges.models.modes import eval_mode
from bridges.models.residual import Norm, ResidualModel


def measure_norm(residual_model: ResidualModel, index: int, reader: int = 0) -> Norm:
    """Gain and centring of the norm before one of a site's reads, from the reads of v, -v, 2v and v + 1.

    Any norm of the form gain * C(v) / RMS(C(v)) + bias shows its gain as the odd part of its answer; ValueError where
    what stands before the read is of another form.
    """
    dtype, d = residual_model.dtype, residual_model.d_model
    scale = {torch.float64: 1e4, torch.float32: 1e3}.get(dtype, 8.0)  # large against eps, safe in float16
    signs = torch.ones(d, dtype=torch.float64)
    signs[1::2] = -1
    signs -= signs.mean()  # an odd width would leave a mean
    v = (signs * scale).to(dtype).to(residual_model.device)
    with eval_mode(residual_model.model), torch.no_grad():
        plus, minus, twice, shifted = _reads(residual_model, index, reader, [v, -v, 2 * v, v + scale])
    half = torch.finfo(dtype).bits == 16
    slack = 1e-2 if half else 1e-4
    if plus.shape == v.shape and difference(plus, v.double().cpu()) == 0:
        return Norm(torch.ones(d, dtype=torch.promote_types(dtype, torch.float32)), False, present=False)
    if plus.shape != v.shape or difference(twice, plus) > slack:
        name = residual_model.sites[index]
        raise ValueError(f"site={name!r}: what stands before its read is not a LayerNorm or an RMSNorm")
    unit = v.double().cpu() / v.double().cpu().square().mean().sqrt()
    gain = _snap((plus - minus) / 2 / unit, residual_model, 2 * torch.finfo(dtype).eps if half else slack / 10)
    return Norm(gain.to(torch.promote_types(dtype, torch.float32)), difference(shifted, plus) < slack)


def _reads(residual_model: ResidualModel, index: int, reader: int, streams: list[Tensor]) -> list[Tensor]:
    tokens = torch.zeros(len(streams), 1, dtype=torch.long, device=residual_model.device)
    residual = torch.stack(streams)[:, None]
    kept: list[Tensor] = []
    module = residual_model.read_modules(index)[reader]
    with residual_model.hook_modules({module: lambda read: kept.append(read)}):
        context = residual_model.context(tokens)
        if index == len(residual_model.sites) - 1:
            residual_model.head(residual, context)
        else:
            residual_model.sublayer(index, residual, context)
    return list(kept[-1][:, 0].double().cpu())


def _snap(gain: Tensor, residual_model: ResidualModel, slack: float) -> Tensor:
    """The model's own weight, or one plus it, where that is what was measured: half precision rounds the probe."""
    weights = [
        p.detach().double().cpu()
        for name, p in residual_model.model.named_parameters()
        if name.endswith("weight") and p.shape == gain.shape and p.device.type != "meta"
    ]
    candidates = [c for w in weights for c in (w, 1 + w)]
    nearest = min(candidates, key=lambda c: difference(c, gain), default=gain)
    return nearest if difference(nearest, gain) <= slack else gain
