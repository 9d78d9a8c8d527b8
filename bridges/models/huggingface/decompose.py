"""Finding out what a Hugging Face model's parts do by running them on a few random tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bridges.models.huggingface.calls import Call, hidden_of, split_call
from bridges.models.residual import input_device, position_ids

PROBE_ROWS, PROBE_TOKENS = 3, 8


class Seen(NamedTuple):
    """One layer's or module's call as the model made it."""

    hidden: Tensor
    call: Call
    output: Tensor
    returned: int
    """0 for a bare tensor, else the length of the tuple."""


class Child(NamedTuple):
    """A module that maps the stream's width to itself inside a layer."""

    mixes_tokens: bool
    returned: int


class Observed(NamedTuple):
    """One pass of the unchanged model."""

    batch: tuple[Tensor, Tensor | None]
    layers: list[Seen]
    logits: Tensor
    real: Tensor
    """[batch, seq], True at tokens to compare: no padding, and without padding all of them."""

    @property
    def returns(self) -> list[int]:
        """How each layer returns."""
        return [layer.returned for layer in self.layers]


def base_model(model: nn.Module) -> nn.Module:
    """The decoder without its unembedding."""
    return getattr(model, "base_model", model)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The shallowest ModuleList as long as the configuration says there are layers; ValueError without one."""
    config = getattr(model, "config", None)
    if config is None or not getattr(model, "get_output_embeddings", lambda: None)():
        raise ValueError(
            f"model={type(model).__name__} is not a Hugging Face language model with an unembedding; "
            "load it through AutoModelForCausalLM"
        )
    n_layers = config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if not lists:
        raise ValueError(f"model={config.model_type!r} has no list of its {n_layers} decoder layers")
    return list(lists[0])


def model_inputs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
    """What to call a Hugging Face model with: no cache, and positions that follow the mask as in `generate`."""
    device = input_device(model)
    inputs: dict[str, Any] = {"input_ids": input_ids.to(device), "use_cache": False}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask.to(device)
        forwards = [type(module).forward for module in (model, base_model(model))]
        if any("position_ids" in inspect.signature(forward).parameters for forward in forwards):
            inputs["position_ids"] = position_ids(inputs["attention_mask"])
    return inputs


def probes(model: nn.Module) -> list[tuple[Tensor, Tensor | None]]:
    """Random tokens without a mask, and with left and right padding. The generator is private: no global seed moves."""
    generator = torch.Generator().manual_seed(0)
    vocab = model.get_input_embeddings().weight.shape[0]  # pyright: ignore
    tokens = torch.randint(vocab, (PROBE_ROWS, PROBE_TOKENS), generator=generator)
    tokens = tokens.to(input_device(model))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    mask[2, -2:] = 0
    return [(tokens, None), (tokens, mask)]


def record(model: nn.Module, layers: list[nn.Module], batch: tuple[Tensor, Tensor | None]) -> Observed:
    """One pass of the unchanged model, with every layer's call and output."""
    with watching(layers) as seen:
        logits = model(**model_inputs(model, *batch)).logits
    if len(seen) < len(layers):
        raise ValueError(
            f"model={model.config.model_type!r} cannot be taken apart: {len(layers)} decoder layers, but "  # pyright: ignore
            f"{len(seen)} different ones are called with the stream"
        )
    if foreign := [i for i, layer in enumerate(layers) if seen[layer].hidden.shape[:-1] != batch[0].shape]:
        shape = list(seen[layers[foreign[0]]].hidden.shape)
        raise ValueError(
            f"model={model.config.model_type!r} cannot be taken apart: layer {foreign[0]} is given a stream of shape "  # pyright: ignore
            f"{shape}, not [batch, seq, d_model]"
        )
    if batch[1] is None:
        real = torch.ones_like(batch[0], dtype=torch.bool)
    else:
        # Eager attention (Gemma 2, Bloom) answers left padding in float64 with NaN: such a row proves nothing.
        real = batch[1].bool() & logits.isfinite().all(-1)
    return Observed(batch, [seen[layer] for layer in layers], logits, real)


@contextmanager
def watching(modules: list[nn.Module]) -> Iterator[dict[nn.Module, Seen]]:
    """Inside, the last call of each module is kept where its first input and output are tensors."""
    seen: dict[nn.Module, Seen] = {}

    def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if (args and isinstance(args[0], Tensor)) or "hidden_states" in kwargs:
            hidden, call = split_call(args, kwargs)
            if isinstance(hidden_of(output), Tensor):
                returned = len(output) if isinstance(output, tuple) else 0
                seen[module] = Seen(hidden, call, hidden_of(output), returned)

    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_hook(keep, with_kwargs=True)
            stack.callback(handle.remove)
        yield seen


def children(layer: nn.Module, seen: Seen) -> dict[nn.Module, Child]:
    """The layer's own modules that map stream to stream, norms and single matrices aside.

    Attention (or a convolution in its place) is told from an MLP by what it does: a change of one token reaches a
    later one.
    """
    candidates = [child for child in layer.children() if any(True for _ in child.children())]
    with watching(candidates) as calls:
        layer(*seen.call.args_with(seen.hidden), **seen.call.kwargs_with(seen.hidden))
    width = seen.hidden.shape
    return {
        child: Child(_mixes_tokens(child, call), call.returned)
        for child, call in calls.items()
        if call.hidden.shape == width and call.output.shape == width
    }


def _mixes_tokens(module: nn.Module, seen: Seen) -> bool:
    changed = seen.hidden.clone()
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(changed[:, -2].shape, generator=generator).to(changed)
    changed[:, -2] = noise * (changed.float().square().mean().sqrt() + 1).to(changed)
    effect = hidden_of(module(*seen.call.args_with(changed), **seen.call.kwargs_with(changed))) - seen.output
    return bool(effect[:, -1].abs().max() > 1e-3 * effect[:, -2].abs().max())


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest magnitude; infinite where either is not finite."""
    if not (ours.isfinite().all() and theirs.isfinite().all()):
        return float("inf")
    if torch.equal(ours, theirs):
        return 0.0
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)).item()


def tolerance(sample: Tensor) -> float:
    """How far the chain may be from the model, relative to the largest magnitude: 0 for float32 and wider on CPUs.

    Elsewhere kernels may sum in another order from call to call: 8 units of the dtype's last place, 64 for float32.
    """
    wide = sample.dtype in (torch.float32, torch.float64)
    if wide and sample.device.type == "cpu":
        return 0.0
    return torch.finfo(sample.dtype).eps * (64 if wide else 8)


def same_layer(split: Tensor, whole: Tensor, parallel: Tensor) -> bool:
    """Whether two halves one after the other are the layer.

    Off the exact CPU dtypes a small random model could pass a tolerance while its halves run in parallel, so there the
    sequential composition must also fit ten times better than the parallel one.
    """
    apart = difference(split, whole)
    return apart == 0 or (apart <= tolerance(whole) and apart <= 0.1 * difference(parallel, whole))
