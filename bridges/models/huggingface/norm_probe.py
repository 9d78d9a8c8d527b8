"""Measuring the norm before a read from its outputs on probe vectors, so that no norm class needs to be known.

Read: the sublayer's input, after the norm.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from copy import deepcopy
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bridges.models.huggingface.calls import CallArguments, as_output, replace_calls, split_arguments
from bridges.models.huggingface.decompose import Submodule, difference
from bridges.models.huggingface.recording import without_autocast
from bridges.models.residual import Norm

# A power of two, so that mean squares of +-SCALE are exact where a norm computes in float32; so large that adding eps
# changes no bit of them in float64.
SCALE = 2.0**24
TOLERANCE = 1e-4


def measure_norm(
    read: Callable[[Float[Tensor, "probes d_model"]], Tensor], probe: Float[Tensor, " d_model"]
) -> Norm | None:
    """The norm that `read` applies to each row, None where it applies something else.

    A norm gain * C(h) / RMS(C(h)) + bias shows its gain in (read(v) - read(-v)) / 2, and whether C subtracts the mean
    over channels in read(v + 1); that it divides by the RMS, in read(2 v). `probe`, from `probe_vector`, is v.
    """
    plus, minus, twice, shifted = read(torch.stack([probe, -probe, 2 * probe, probe + SCALE])).to(probe)
    if plus.shape != probe.shape:
        return None
    if torch.equal(plus, probe):
        return Norm(torch.ones_like(probe), centred=False, present=False)
    if difference(twice, plus) > TOLERANCE:
        return None
    gain = (plus - minus) / 2 * probe.square().mean().sqrt() / probe
    return Norm(gain, centred=difference(shifted, plus) < TOLERANCE)


def probe_vector(d_model: int, device: torch.device) -> Float[Tensor, " d_model"]:
    """Alternating signs times SCALE with mean 0, in float64, or in float32 where the device has no float64."""
    signs = torch.ones(d_model, dtype=torch.float64)
    signs[1::2] = -1
    probe = (signs - signs.mean()) * SCALE  # an odd width has a mean to subtract
    return probe.to(device, torch.float32 if device.type == "mps" else torch.float64)


def read_in_layer(
    layer: nn.Module,
    submodules: Mapping[nn.Module, Submodule],
    reader: nn.Module,
    arguments: CallArguments,
    streams: Float[Tensor, "n 1 d_model"],
) -> Float[Tensor, "n 1 d_model"]:
    """What a submodule is given when `streams` enter a copy of its layer that computes in their dtype.

    Attention and everything called from `reader` on are neither copied nor run; what is called before may be a norm.
    """
    order = list(submodules)
    skipped = [one for one in order if submodules[one].mixes_tokens or order.index(one) >= order.index(reader)]
    reads: dict[nn.Module, Tensor] = {}

    def skip(module: nn.Module) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            reads[module] = split_arguments(args, kwargs)[0]
            return as_output(torch.zeros_like(reads[module]), submodules[module].tuple_length)

        return call

    with replace_calls({module: skip(module) for module in skipped}):
        arguments.call(copy_as(layer, streams.dtype, skipped), streams)
    return reads[reader]


def read_in_head(
    model: nn.Module, inputs: Mapping[str, Any], layers: Mapping[nn.Module, Callable[..., Any]], dtype: torch.dtype
) -> Float[Tensor, "n 1 d_model"]:
    """What the unembedding is given in a copy of the model that computes in `dtype`, with `layers` replaced by calls.

    The layers, the unembedding and every embedding are not copied.
    """
    reader: nn.Module = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    reads: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        reads.append(hidden)
        return hidden

    inside = {part for layer in layers for part in layer.modules()}
    embeddings = [part for part in model.modules() if isinstance(part, nn.Embedding) and part not in inside]
    replaced = {**layers, **{one: _call_as(one, dtype) for one in embeddings}, reader: keep}
    copied = copy_as(model, dtype, replaced)
    with replace_calls(replaced), without_autocast(copied):
        copied(**inputs)
    return reads[0]


def _call_as(module: nn.Module, dtype: torch.dtype) -> Callable[..., Tensor]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = nn.Module._call_impl(module, *args, **kwargs)  # pyright: ignore[reportAssignmentType]
        return output.to(dtype)

    return call


def copy_as(module: nn.Module, dtype: torch.dtype, shared: Iterable[nn.Module] = ()) -> nn.Module:
    """A copy of a module that computes in `dtype`, without its hooks; `shared` submodules are not copied.

    Weights, submodules and methods of the object's own are copied, every other attribute is shared: a user's lock or
    stored activation cannot be copied. A model that accelerate offloads keeps weights elsewhere: the copy shares
    accelerate's hook, which brings them, and casts them to the copy's dtype.
    """
    originals = set(module.modules())
    memo: dict[int, object] = {}
    for original in originals:
        memo |= {id(value): value for name, value in vars(original).items() if not _is_copied(name, value, originals)}
    for original in originals:
        # An attribute may also refer to a weight or a submodule, which is copied all the same.
        for one in (original, *original._parameters.values(), *original._buffers.values()):
            if one is not None:
                memo.pop(id(one), None)
        # A hook may refer to anything, the whole model included: none is followed.
        memo |= {id(hooks): OrderedDict() for name, hooks in vars(original).items() if name.endswith("_hooks")}
    memo |= {id(one): one for one in shared}
    copied = deepcopy(module, memo)
    for part in copied.modules():
        if part not in originals:
            vars(part).pop("_steer_plans", None)  # the edits are hooks, which the copy does not have
            for name, parameter in part._parameters.items():
                if parameter is not None and parameter.is_floating_point():
                    part._parameters[name] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    part._buffers[name] = buffer.to(dtype)
    return copied


def _is_copied(name: str, value: Any, modules: Collection[nn.Module]) -> bool:
    """Whether a copy has its own: weights, submodules, and methods that would run the original module."""
    if isinstance(value, MethodType):
        return value.__self__ in modules
    # accelerate and steer() replace forward by a callable that holds the module; accelerate keeps the one before, too.
    return name in ("_parameters", "_buffers", "_modules", "forward", "_old_forward")
