"""Any Hugging Face decoder-only model as a chain of sublayers, without a table of architectures.

A decoder layer with its MLP silenced is the attention sublayer; with its attention silenced, the MLP sublayer. Both
are found by what they do, and the adapter proves on a few random tokens that the chain is the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridges.models.huggingface import decompose as probing
from bridges.models.huggingface.calls import Call, hidden_of, like, replaced_calls, split_call
from bridges.models.huggingface.norm_probe import measure_norm
from bridges.models.modes import attribute, eval_mode
from bridges.models.residual import Context, HookFunction, Norm, ResidualModel, Site, input_hook


def _output_hook(visitor: HookFunction) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: tuple, output: Any) -> Any:
        changed = visitor(hidden_of(output))
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


class Part(NamedTuple):
    """One sublayer: a decoder layer with one of its two halves silenced, or the whole of it."""

    layer: int
    silenced: nn.Module | None
    reads: list[nn.Module]
    """The modules that read the stream at its site."""


@dataclass(frozen=True)
class _Shared:
    """What a batch's sublayers share: the model's own keyword arguments and each layer's call, without the stream."""

    inputs: dict[str, Any]
    calls: list[Call]


_MIDDLES: WeakKeyDictionary[nn.Module, tuple[list[HookFunction], ExitStack]] = WeakKeyDictionary()
"""Per layer that runs as its halves: who sees the stream between them, and what makes it whole again."""


class HuggingFaceResidual(ResidualModel):
    """A Hugging Face causal language model as a `ResidualModel`; built by `as_residual`."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        self.layers = probing.decoder_layers(model)
        with eval_mode(model), torch.no_grad():
            passes = [probing.record(model, self.layers, batch) for batch in probing.probes(model)]
            self._returns = passes[0].returns
            self._children = [probing.children(layer, passes[0].layers[i]) for i, layer in enumerate(self.layers)]
            self.d_model = passes[0].layers[0].hidden.shape[-1]
            self.vocab_size = passes[0].logits.shape[-1]
            self._parts: list[Part] = []
            for index in range(len(self.layers)):
                self._parts += self._split(index, passes[0].layers[index])
            self.sites = [*self._names(), Site("final")]
            for observed in passes:
                self._prove(observed)
            self._prove_causal(passes[0])

    @cached_property
    def context_length(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The configuration's `max_position_embeddings`, None without one."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)  # pyright: ignore

    def context(self, input_ids: Int[Tensor, "b s"], attention_mask: Int[Tensor, "b s"] | None = None) -> Context:
        """Run the model with every layer skipped, keeping what it hands to each layer."""
        inputs = probing.model_inputs(self.model, input_ids, attention_mask)
        calls: dict[int, Call] = {}
        embedding: list[Tensor] = []

        def skip(index: int) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, calls[index] = split_call(args, kwargs)
                embedding.append(hidden)
                return like(self._returns[index], hidden)

            return forward

        with replaced_calls({layer: skip(i) for i, layer in enumerate(self.layers)}):
            probing.base_model(self.model)(**inputs)
        shared = _Shared(inputs, [calls[i] for i in range(len(self.layers))])
        return Context(input_ids, attention_mask, embedding[0], shared)

    def sublayer(self, index: int, residual: Float[Tensor, "b s d"], context: Context) -> Float[Tensor, "b s d"]:
        """One half of a decoder layer (or the whole of a `block`), called as the model would call it."""
        part = self._parts[index]
        return self._run_part(part, residual, context.extra.calls[part.layer])

    def head(self, residual: Float[Tensor, "b s d"], context: Context) -> Float[Tensor, "b s vocab"]:
        """The model with every layer skipped and `residual` in place of the last one's output."""

        def skip(index: int) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                here = split_call(args, kwargs)[0]
                return like(self._returns[index], residual if index == len(self.layers) - 1 else here)

            return forward

        with replaced_calls({layer: skip(i) for i, layer in enumerate(self.layers)}):
            return self.model(**context.extra.inputs).logits

    def read_modules(self, index: int) -> list[nn.Module]:
        """The attention or MLP module of the sublayer, both of a block that reads one stream twice; at `final` the
        unembedding."""
        if index == len(self._parts):
            return [self.model.get_output_embeddings()]  # pyright: ignore[reportCallIssue]
        modules = self._parts[index].reads
        if not modules:
            raise ValueError(f"site={self.sites[index]!r} of {self.family} has no module that reads the stream")
        return modules

    def norm(self, index: int, reader: int = 0) -> Norm:
        """Measured by what it does to probe vectors, so that no norm class needs to be known."""
        return measure_norm(self, index, reader)

    @contextmanager
    def hook_residuals(self, visitors: Mapping[int, HookFunction]) -> Iterator[None]:
        """Hooks on the layers; a stream between a layer's halves shows by running them one after the other."""
        with ExitStack() as stack:
            for index, visitor in visitors.items():
                if index == len(self._parts):
                    handle = self.layers[-1].register_forward_hook(_output_hook(visitor))
                    stack.callback(handle.remove)
                elif index == 0 or self._parts[index - 1].layer != self._parts[index].layer:
                    layer = self.layers[self._parts[index].layer]
                    handle = layer.register_forward_pre_hook(input_hook(visitor, self.d_model), with_kwargs=True)
                    stack.callback(handle.remove)
                else:
                    stack.enter_context(self._in_the_middle(index, visitor))
            yield

    @contextmanager
    def _in_the_middle(self, index: int, visitor: HookFunction) -> Iterator[None]:
        """Inside, a layer runs as its two halves with the visitor between; hooks around the layer still run once.

        The last visitor to leave makes the layer whole again, whoever came first.
        """
        layer = self.layers[self._parts[index].layer]
        if layer not in _MIDDLES:
            visitors, halves = [], ExitStack()
            halves.enter_context(attribute(layer, "forward", self._halves(index, visitors)))
            _MIDDLES[layer] = visitors, halves
        visitors, halves = _MIDDLES[layer]
        visitors.append(visitor)
        try:
            yield
        finally:
            visitors.remove(visitor)
            if not visitors:
                halves.close()
                del _MIDDLES[layer]

    def _halves(self, index: int, visitors: list[HookFunction]) -> Callable[..., Any]:
        number = self._parts[index].layer
        whole = self.layers[number].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, call = split_call(args, kwargs)
            middle = self._run_part(self._parts[index - 1], hidden, call, whole)
            for visitor in visitors:
                changed = visitor(middle)
                middle = middle if changed is None else changed
            return like(self._returns[number], self._run_part(self._parts[index], middle, call, whole))

        return forward

    def _run_part(self, part: Part, residual: Tensor, call: Call, forward: Callable[..., Any] | None = None) -> Tensor:
        layer, silence = forward or self.layers[part.layer], nullcontext()
        if part.silenced is not None:
            returned = self._children[part.layer][part.silenced].returned

            def zeros(*args: Any, **kwargs: Any) -> Any:
                return like(returned, torch.zeros_like(split_call(args, kwargs)[0]))

            silence = replaced_calls({part.silenced: zeros})
        with silence:
            return hidden_of(layer(*call.args_with(residual), **call.kwargs_with(residual)))

    def _split(self, index: int, seen: probing.Seen) -> list[Part]:
        """Two halves where their composition is the layer itself, else one block."""
        mixing = [child for child, seen_child in self._children[index].items() if seen_child.mixes_tokens]
        pointwise = [child for child, seen_child in self._children[index].items() if not seen_child.mixes_tokens]
        block = [Part(index, None, mixing[:1])]
        if len(mixing) != 1 or len(pointwise) != 1:
            return block
        halves = [Part(index, pointwise[0], mixing), Part(index, mixing[0], pointwise)]
        middle = self._run_part(halves[0], seen.hidden, seen.call)
        end = self._run_part(halves[1], middle, seen.call)
        parallel = middle + self._run_part(halves[1], seen.hidden, seen.call) - seen.hidden
        if probing.same_layer(end, seen.output, parallel):
            return halves
        return [Part(index, None, [*mixing, *self._beside(index, halves, seen)])]

    def _beside(self, index: int, halves: list[Part], seen: probing.Seen) -> list[nn.Module]:
        """The MLP of a block, if it reads the block's own stream: attention then makes no difference to its input."""
        (mlp,) = halves[1].reads
        with probing.watching([mlp]) as alone:
            self._run_part(halves[1], seen.hidden, seen.call)
        with probing.watching([mlp]) as together:
            self._run_part(Part(index, None, []), seen.hidden, seen.call)
        return [mlp] if torch.equal(alone[mlp].hidden, together[mlp].hidden) else []

    def _names(self) -> Iterator[Site]:
        for part in self._parts:
            if part.silenced is None:
                yield Site(f"{part.layer}.block")
            else:
                attention = self._children[part.layer][part.silenced].mixes_tokens is False
                yield Site(f"{part.layer}.attn" if attention else f"{part.layer}.mlp")

    def _prove_causal(self, observed: probing.Observed) -> None:
        """A change of the last token must not reach logits before it; ValueError otherwise."""
        ids = observed.batch[0].clone()
        ids[:, -1] = (ids[:, -1] + 1) % len(self.model.get_input_embeddings().weight)  # pyright: ignore
        changed = self.model(**probing.model_inputs(self.model, ids, None)).logits
        apart = probing.difference(changed[:, :-1], observed.logits[:, :-1])
        # Experts that take tokens together round differently.
        if apart > max(1e-4, 100 * torch.finfo(changed.dtype).eps):
            raise ValueError(
                f"model={self.family!r} is no decoder: its last token changes earlier logits by {apart:.3g} (relative)"
            )

    def _prove(self, observed: probing.Observed) -> None:
        """The chain must give the model's own logits; ValueError with family, layer and difference otherwise."""
        trace = self.trace(*observed.batch)
        real = observed.real
        difference = probing.difference(trace.logits[real], observed.logits[real])
        if difference <= probing.tolerance(observed.logits):
            return
        starts = {part.layer: i for i, part in reversed(list(enumerate(self._parts)))}
        for layer, seen in enumerate(observed.layers):
            apart = probing.difference(trace.residuals[starts[layer]][real], seen.hidden[real])
            if not apart <= probing.tolerance(seen.hidden):
                where, difference = f"the input of layer {layer}", apart
                break
        else:
            where = "the logits, after the last layer"
        raise ValueError(
            f"model={self.family!r} cannot be taken apart: sublayers run one by one differ from the model by "
            f"{difference:.3g} (relative) at {where}; it is not a plain decoder-only chain, or not finite"
        )
