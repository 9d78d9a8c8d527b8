"""How a Hugging Face decoder is split into sublayers, without a table of architectures.

1. `decoder_layers` finds the list of decoder layers.
2. `find_submodules` finds a layer's attention and MLP by what they do: only attention carries a change of one token to
   a later one.
3. `split_layer` makes two sublayers of a layer: with the output of its MLP replaced by zeros it is the attention
   sublayer, with the output of its attention replaced by zeros the MLP sublayer. A layer that these two in sequence do
   not reproduce stays whole, a `block`.
4. `check_chain` and `check_causal` compare the chain of sublayers with the model itself on random tokens.

`adapter.py` runs what is found here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bridges.models.huggingface.calls import (
    CallArguments,
    LayerCall,
    as_output,
    output_hidden,
    record_calls,
    replace_calls,
    split_arguments,
)
from bridges.models.huggingface.recording import ForwardRecord, model_inputs, text_config, without_autocast
from bridges.models.modes import not_recomputed
from bridges.models.residual import ResidualModel, Site, input_hook
from bridges.models.tokens import Batch
from bridges.models.wrapped import unembedding


class Submodule(NamedTuple):
    """What is known of a module inside a layer that maps a stream to a stream of the same width."""

    mixes_tokens: bool
    """True for attention (or a convolution in its place), False for an MLP."""
    tuple_length: int
    """Length of the tuple that it returns, 0 for a bare tensor."""


class Sublayer(NamedTuple):
    """A decoder layer with the output of one of its two submodules replaced by zeros, or the whole layer."""

    layer: int
    zeroed: nn.Module | None
    """The submodule whose output is replaced by zeros; None for a whole layer."""
    readers: list[nn.Module]
    """The submodules that read the stream at this sublayer's site."""


@dataclass(frozen=True)
class Decomposition:
    """A model's layers, their submodules, and the sublayers made of them, in order."""

    layers: list[nn.Module]
    tuple_lengths: list[int]
    """Per layer, the length of the tuple that it returns, 0 for a bare tensor."""
    submodules: list[dict[nn.Module, Submodule]]
    """Per layer, in the order of their calls."""
    sublayers: list[Sublayer]
    sites: list[Site]
    """One per sublayer, then `final`."""

    def run(
        self, sublayer: Sublayer, hidden: Tensor, arguments: CallArguments, forward: Callable[..., Any] | None = None
    ) -> Tensor:
        """The stream after a sublayer; `forward` is called in place of its layer where given."""
        return _run(self.layers[sublayer.layer], self.submodules[sublayer.layer], sublayer, hidden, arguments, forward)


def decompose(layers: list[nn.Module], record: ForwardRecord) -> Decomposition:
    """Split every layer of a recorded forward pass into sublayers."""
    submodules = [find_submodules(layer, call) for layer, call in zip(layers, record.layers, strict=True)]
    sublayers: list[Sublayer] = []
    for index, layer in enumerate(layers):
        sublayers += split_layer(index, layer, submodules[index], record.layers[index])
    sites = [Site(_site_name(sublayer, submodules[sublayer.layer])) for sublayer in sublayers]
    return Decomposition(
        layers, [call.tuple_length for call in record.layers], submodules, sublayers, [*sites, Site("final")]
    )


def check_language_model(model: nn.Module) -> None:
    """ValueError unless the model has a configuration and an unembedding."""
    if getattr(model, "config", None) is None or unembedding(model) is None:
        raise ValueError(
            f"model={type(model).__name__} is not a Hugging Face language model with an unembedding; "
            "load it through AutoModelForCausalLM"
        )


def _unwrapped(layer: nn.Module) -> nn.Module:
    """The layer that torch.compile, or PyTorch's own wrapper for checkpointing, holds inside."""
    for name in ("_orig_mod", "_checkpoint_wrapped_module"):
        layer = getattr(layer, name, layer)
    return layer


def decoder_layers(model: nn.Module, batch: Batch) -> list[nn.Module]:
    """The outermost ModuleList as long as the configuration's number of layers; ValueError without one.

    Where there are several (a vision tower may have as many layers as its text model), the one whose members are called
    with a stream [batch, seq, d_model] in a pass over the batch.
    """
    n_layers = text_config(model).num_hidden_layers
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if not lists:
        raise ValueError(f"model={model.config.model_type!r} has no list of its {n_layers} decoder layers")  # pyright: ignore
    lists = [[_unwrapped(layer) for layer in one] for one in lists]
    if len(lists) == 1:
        return lists[0]
    with record_calls({layer: None for one in lists for layer in one}) as calls, without_autocast(model):
        model(**model_inputs(model, *batch))
    streams = {layer for layer, call in calls.items() if call.hidden.shape[:-1] == batch[0].shape}
    return max(lists, key=lambda one: len(streams.intersection(one)))  # the first, where several have as many


def find_submodules(layer: nn.Module, call: LayerCall) -> dict[nn.Module, Submodule]:
    """The layer's own modules that map stream to stream, without norms and single matrices."""
    candidates = [child for child in layer.children() if any(True for _ in child.children())]
    with record_calls(candidates) as calls:
        call.arguments.call(layer, call.hidden)
    shape = call.hidden.shape
    return {
        child: Submodule(_mixes_tokens(layer, call, child, recorded), recorded.tuple_length)
        for child, recorded in calls.items()
        if recorded.hidden.shape == shape and recorded.output.shape == shape
    }


def split_layer(
    index: int, layer: nn.Module, submodules: dict[nn.Module, Submodule], call: LayerCall
) -> list[Sublayer]:
    """Two sublayers where their composition is the layer itself, else the whole layer as one."""
    mixing = [child for child, submodule in submodules.items() if submodule.mixes_tokens]
    pointwise = [child for child, submodule in submodules.items() if not submodule.mixes_tokens]
    if len(mixing) != 1 or len(pointwise) != 1:
        return [Sublayer(index, None, mixing[:1] or pointwise[:1])]  # some layers are an MLP alone
    first, second = Sublayer(index, pointwise[0], mixing), Sublayer(index, mixing[0], pointwise)

    def run(sublayer: Sublayer, hidden: Tensor) -> Tensor:
        return _run(layer, submodules, sublayer, hidden, call.arguments)

    middle = run(first, call.hidden)
    sequential = run(second, middle)
    with record_calls(pointwise) as without_attention:
        parallel = middle + run(second, call.hidden) - call.hidden
    if same_layer(sequential, call.output, parallel):
        return [first, second]
    with record_calls(pointwise) as with_attention:
        run(Sublayer(index, None, []), call.hidden)
    # An MLP whose input attention does not change reads the layer's own stream.
    reads_too = torch.equal(without_attention[pointwise[0]].hidden, with_attention[pointwise[0]].hidden)
    return [Sublayer(index, None, [*mixing, *pointwise] if reads_too else mixing)]


def _run(
    layer: nn.Module,
    submodules: dict[nn.Module, Submodule],
    sublayer: Sublayer,
    hidden: Tensor,
    arguments: CallArguments,
    forward: Callable[..., Any] | None = None,
) -> Tensor:
    replaced: dict[nn.Module, Callable[..., Any]] = {}
    if sublayer.zeroed is not None:
        length = submodules[sublayer.zeroed].tuple_length
        replaced[sublayer.zeroed] = lambda *args, **kwargs: as_output(
            torch.zeros_like(split_arguments(args, kwargs)[0]), length
        )
    with replace_calls(replaced), not_recomputed([layer]):
        return output_hidden(arguments.call(forward or layer, hidden))


def _site_name(sublayer: Sublayer, submodules: dict[nn.Module, Submodule]) -> str:
    if sublayer.zeroed is None:
        return f"{sublayer.layer}.block"
    return f"{sublayer.layer}.{'mlp' if submodules[sublayer.zeroed].mixes_tokens else 'attn'}"


def _mixes_tokens(layer: nn.Module, layer_call: LayerCall, module: nn.Module, call: LayerCall) -> bool:
    """Whether a change of the second-last token of a module's input changes the module's output at the last one.

    The module runs inside its layer: accelerate may bring its weights for the layer's call only.
    """
    changed = call.hidden.clone()
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(changed[:, -2].shape, generator=generator).to(changed)
    changed[:, -2] = noise * (changed.float().square().mean().sqrt() + 1).to(changed)
    handle = module.register_forward_pre_hook(input_hook(lambda _: changed, changed.shape[-1]), with_kwargs=True)
    try:
        with record_calls([module]) as calls:
            layer_call.arguments.call(layer, layer_call.hidden)
    finally:
        handle.remove()
    effect = calls[module].output - call.output
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
    """How far the sublayers in sequence may be from the model, relative to the largest magnitude.

    0 for float32 and float64 on CPUs. Elsewhere kernels may sum in another order from call to call: 8 units of the
    dtype's last place, 64 for float32.
    """
    wide = sample.dtype in (torch.float32, torch.float64)
    if wide and sample.device.type == "cpu":
        return 0.0
    return torch.finfo(sample.dtype).eps * (64 if wide else 8)


def same_layer(sequential: Tensor, whole: Tensor, parallel: Tensor) -> bool:
    """Whether the two sublayers in sequence are the layer.

    Where `tolerance` is not 0, a small random model could pass it while its sublayers run in parallel, so there the
    sequential composition must also fit ten times better than the parallel one.
    """
    error = difference(sequential, whole)
    return error == 0 or (error <= tolerance(whole) and error <= 0.1 * difference(parallel, whole))


def check_chain(residual_model: ResidualModel, decomposition: Decomposition, record: ForwardRecord) -> None:
    """ValueError, naming the layer and the difference, unless the chain of sublayers gives the model's own logits."""
    trace = residual_model.trace(*record.batch)
    counted = record.counted
    error = difference(trace.logits[counted], record.logits[counted])
    if error <= tolerance(record.logits):
        return
    for layer, stream in _layer_inputs(decomposition, trace.residuals):
        recorded = record.layers[layer].hidden
        at_layer = difference(stream[counted], recorded[counted])
        if not at_layer <= tolerance(recorded):
            where, error = f"the input of layer {layer}", at_layer
            break
    else:
        where = "the logits, after the last layer"
    raise ValueError(
        f"model={residual_model.model.config.model_type!r} cannot be split into sublayers: run one by one, they differ "  # pyright: ignore
        f"from the model by {error:.3g} (relative) at {where}; it is not a plain decoder-only model, or not finite"
    )


def _layer_inputs(decomposition: Decomposition, residuals: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Each layer's index and the stream at its first site."""
    first: dict[int, Tensor] = {}
    for sublayer, stream in zip(decomposition.sublayers, residuals, strict=False):
        first.setdefault(sublayer.layer, stream)
    yield from first.items()


def check_causal(model: nn.Module, record: ForwardRecord) -> None:
    """ValueError if a change of the last token reaches logits before it."""
    ids = record.batch[0].clone()
    ids[:, -1] = (ids[:, -1] + 1) % len(model.get_input_embeddings().weight)  # pyright: ignore
    with without_autocast(model):
        changed = model(**model_inputs(model, ids, None)).logits
    error = difference(changed[:, :-1], record.logits[:, :-1])
    # Experts that take tokens together round differently.
    if error > max(1e-4, 100 * torch.finfo(changed.dtype).eps):
        raise ValueError(
            f"model={model.config.model_type!r} is not a decoder: its last token changes earlier logits by "  # pyright: ignore
            f"{error:.3g} (relative)"
        )
