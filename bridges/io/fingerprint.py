"""A model's fingerprint: a hash of its parameter values that survives a change of dtype, device or sharding."""

from __future__ import annotations

import hashlib
from weakref import WeakKeyDictionary

import torch
from torch import nn

_ROUNDINGS = {"bf16": torch.bfloat16, "fp16": torch.float16}
_KNOWN: WeakKeyDictionary[nn.Module, tuple[list[tuple], str]] = WeakKeyDictionary()


def fingerprint(model: nn.Module) -> str:
    """Hash the parameters, as `bf16:HEX fp16:HEX`: once rounded to bfloat16, once to float16.

    A float32 or float64 model and its own half-precision copy then share one of the two; see `same_model`.
    ValueError for parameters without values (offloaded to disk, or on the meta device).
    """
    parameters = sorted(model.named_parameters())
    for name, parameter in parameters:
        if parameter.device.type == "meta":
            raise ValueError(
                f"parameter {name!r} holds no values (offloaded or meta device): no fingerprint possible; load the "
                "model whole, or pass check_models=False where it is only checked"
            )
    return " ".join(f"{label}:{_hash(parameters, dtype)}" for label, dtype in _ROUNDINGS.items())


def checked_fingerprint(model: nn.Module) -> str:
    """The fingerprint, computed once for as long as no parameter was replaced or changed in place.

    Hashing takes seconds for a model of a hundred million parameters, and a loop may check one at every pass. Writes
    behind autograd's back (through `.data`, in inference mode) go unnoticed: enough for a check, not for a record.
    """
    state = [
        (name, p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype, p.shape)
        for name, p in model.named_parameters()
    ]
    if model not in _KNOWN or _KNOWN[model][0] != state:
        _KNOWN[model] = state, fingerprint(model)
    return _KNOWN[model][1]


def same_model(one: str, other: str) -> bool:
    """Whether two fingerprints are of one model, in whatever dtypes it was held."""
    return bool(set(one.split()) & set(other.split()))


def _hash(parameters: list[tuple[str, nn.Parameter]], dtype: torch.dtype) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in parameters:
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        rounded = parameter.detach().to(dtype) + 0  # -0 and 0 are one value
        digest.update(rounded.contiguous().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()
