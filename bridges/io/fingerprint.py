"""A model's fingerprint: a hash of its parameter values that does not depend on dtype or device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

_ROUNDINGS = {"bf16": torch.bfloat16, "fp16": torch.float16}
_CACHE: WeakKeyDictionary[nn.Module, tuple[list[tuple], str]] = WeakKeyDictionary()


def fingerprint(model: nn.Module) -> str:
    """Hash a model's parameters twice, rounded to bfloat16 and to float16, as `bf16:HEX fp16:HEX`.

    A model in float32 or float64 shares one of the two with its own half-precision copy; compare with `same_model`.
    Parameters that accelerate has offloaded, to the CPU or to disk, are read one at a time from where it keeps them.
    Raises ValueError if a parameter has no values (on the meta device, and not by accelerate).
    """
    parameters, offloading = dict(_named_parameters(model)), _offloading_hooks(model)
    for name, parameter in parameters.items():
        if parameter.is_meta and parameter not in offloading:
            raise ValueError(
                f"parameter {name!r} holds no values (it is on the meta device, and accelerate keeps none for it), so "
                "that the model has no fingerprint; load the model's weights, with from_pretrained or load_state_dict"
            )
    digests = {label: hashlib.blake2b(digest_size=16) for label in _ROUNDINGS}
    for name, parameter in sorted(parameters.items()):
        value = parameter.detach()
        if parameter.is_meta:
            hook, key = offloading[parameter]
            value = hook.weights_map[key].to(parameter.dtype)  # as accelerate casts it for a call
        for label, digest in digests.items():
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(_rounded_bytes(value, _ROUNDINGS[label]))
    return " ".join(f"{label}:{digest.hexdigest()}" for label, digest in digests.items())


def checked_fingerprint(model: nn.Module) -> str:
    """The fingerprint, computed again only after a parameter was replaced or changed in place, or offloaded anew.

    Hashing takes seconds for a model of a hundred million parameters, and a loop may check the model at every pass.
    Changes that autograd does not count (through `.data`, in inference mode, of offloaded values where they are kept)
    go unnoticed: use it to check a model, and `fingerprint` to record one.
    """
    offloading = _offloading_hooks(model)
    state = [
        (name, ref(offloading[p][0]) if p in offloading else p.data_ptr(), _version(p), p.dtype, p.shape)
        for name, p in _named_parameters(model)
    ]
    if model not in _CACHE or _CACHE[model][0] != state:
        _CACHE[model] = state, fingerprint(model)
    return _CACHE[model][1]


def same_model(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same model, perhaps in different dtypes."""
    return bool(set(one.split()) & set(other.split()))


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters, a tied one once.

    Every call of an offloaded module leaves new placeholders, so that those of tied parameters are separate objects.
    """
    tied, first = getattr(model, "all_tied_weights_keys", {}), {}
    for name, parameter in model.named_parameters():
        known = first.setdefault(tied.get(name, name), parameter)
        if known is parameter or not (known.is_meta or parameter.is_meta):
            yield name, parameter


def _offloading_hooks(model: nn.Module) -> dict[nn.Parameter, tuple[Any, str]]:
    """Per placeholder of an offloaded parameter: accelerate's hook, and the name in its `weights_map`."""
    found = {}
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            if getattr(one, "weights_map", None) is not None:
                inside = module.named_parameters(recurse=one.place_submodules)  # pyright: ignore
                found |= {parameter: (one, name) for name, parameter in inside if parameter.is_meta}
    return found


def _version(parameter: nn.Parameter) -> int:
    return 0 if parameter.is_inference() else parameter._version


def _rounded_bytes(value: Tensor, dtype: torch.dtype) -> bytes:
    rounded = value.to(dtype) + 0  # -0 becomes 0, which has other bits
    return rounded.contiguous().view(torch.int16).cpu().numpy().tobytes()
