"""A model's fingerprint: a hash of its parameter values that does not depend on dtype, device or sharding."""

from __future__ import annotations

import hashlib
from weakref import WeakKeyDictionary

import torch
from torch import nn

_ROUNDINGS = {"bf16": torch.bfloat16, "fp16": torch.float16}
_CACHE: WeakKeyDictionary[nn.Module, tuple[list[tuple], str]] = WeakKeyDictionary()


def fingerprint(model: nn.Module) -> str:
    """Hash a model's parameters twice, rounded to bfloat16 and to float16, as `bf16:HEX fp16:HEX`.

    A model in float32 or float64 shares one of the two with its own half-precision copy; compare with `same_model`.
    Raises ValueError if a parameter has no values (offloaded to disk, or on the meta device).
    """
    parameters = sorted(model.named_parameters())
    for name, parameter in parameters:
        if parameter.device.type == "meta":
            raise ValueError(
                f"parameter {name!r} holds no values (it is offloaded or on the meta device), so that the model has no "
                "fingerprint; load the whole model, or pass check_models=False where the function takes it"
            )
    return " ".join(f"{label}:{_hash(parameters, dtype)}" for label, dtype in _ROUNDINGS.items())


def checked_fingerprint(model: nn.Module) -> str:
    """The fingerprint, computed again only after a parameter was replaced or changed in place.

    Hashing takes seconds for a model of a hundred million parameters, and a loop may check the model at every pass.
    Changes that autograd does not count (through `.data`, in inference mode) go unnoticed: use it to check a model, and
    `fingerprint` to record one.
    """
    state = [
        (name, p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype, p.shape)
        for name, p in model.named_parameters()
    ]
    if model not in _CACHE or _CACHE[model][0] != state:
        _CACHE[model] = state, fingerprint(model)
    return _CACHE[model][1]


def same_model(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same model, perhaps in different dtypes."""
    return bool(set(one.split()) & set(other.split()))


def _hash(parameters: list[tuple[str, nn.Parameter]], dtype: torch.dtype) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in parameters:
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        rounded = parameter.detach().to(dtype) + 0  # -0 becomes 0, which has other bits
        digest.update(rounded.contiguous().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()
