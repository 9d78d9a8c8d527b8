"""Any Hugging Face decoder-only model as a `ResidualModel`: what `decompose.py` finds, run as a chain of sublayers.

Read: the sublayer's input, after the norm.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridges.models.huggingface.calls import CallArguments, as_output, output_hidden, replace_calls, split_arguments
from bridges.models.huggingface.decompose import (
    check_causal,
    check_chain,
    check_language_model,
    decoder_layers,
    decompose,
)
from bridges.models.huggingface.norm_probe import measure_norm, probe_vector, read_in_head, read_in_layer
from bridges.models.huggingface.recording import (
    base_model,
    model_inputs,
    probe_batches,
    record_forward,
    text_config,
    without_autocast,
)
from bridges.models.huggingface.split_rows import runs_after_prefix
from bridges.models.modes import eval_mode, not_recomputed, replaced_attribute, uncompiled
from bridges.models.prefix import PrefixCache
from bridges.models.residual import Context, HookFunction, Norm, ResidualModel, input_hook


@dataclass(frozen=True)
class _BatchCalls:
    """What the sublayers of one batch share: the model's keyword arguments, and each layer's without the stream."""

    inputs: dict[str, Any]
    arguments: list[CallArguments]


class _SplitLayer(NamedTuple):
    """A layer whose forward runs its two sublayers one after the other."""

    hooks: list[HookFunction]
    """Called on the stream between the sublayers."""
    forward: Callable[..., Any]
    """The layer's own forward."""
    restore: ExitStack


_SPLIT_LAYERS: WeakKeyDictionary[nn.Module, _SplitLayer] = WeakKeyDictionary()


class HuggingFaceResidual(ResidualModel):
    """A Hugging Face causal language model as a `ResidualModel`; built by `as_residual`."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        check_language_model(model)
        with eval_mode(model), torch.no_grad():
            batches = probe_batches(model)
            self.layers = decoder_layers(model, batches[0])
            records = [record_forward(model, self.layers, batch) for batch in batches]
            self.d_model = records[0].layers[0].hidden.shape[-1]
            n_embedded = len(model.get_input_embeddings().weight)  # pyright: ignore
            self._logits_width = records[0].logits.shape[-1]
            self.vocab_size = min(self._logits_width, n_embedded)
            self.decomposition = decompose(self.layers, records[0])
            self.sites = self.decomposition.sites
            for record in records:
                check_chain(self, self.decomposition, record)
            check_causal(model, records[0])

    @property
    def logits_width(self) -> int:
        """Logits of a token, some of which may belong to no token."""
        return self._logits_width

    @cached_property
    def context_length(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The configuration's `max_position_embeddings`, None without one."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)  # pyright: ignore

    def context(
        self,
        input_ids: Int[Tensor, "b s"],
        attention_mask: Int[Tensor, "b total"] | None = None,
        prefix: PrefixCache | None = None,
    ) -> Context:
        """Run the model with every layer skipped, and keep what it gives to each layer."""
        inputs = model_inputs(self.model, input_ids, attention_mask, prefix)
        embedding: list[Tensor] = []
        arguments: dict[int, CallArguments] = {}

        def keep(index: int, hidden: Tensor, rest: CallArguments) -> None:
            embedding.append(hidden)
            arguments[index] = rest

        with not_recomputed(self.layers), replace_calls(self._skipped_layers(keep=keep)):
            base_model(self.model)(**inputs)
        calls = _BatchCalls(inputs, [arguments[i] for i in range(len(self.layers))])
        return Context(input_ids, attention_mask, embedding[0], calls)

    def empty_prefix(self) -> PrefixCache | None:
        """None unless the model's own cache is of keys and values alone, and sublayers after a prefix give the same."""
        return PrefixCache(config=text_config(self.model)) if self._runs_after_prefix else None

    @cached_property
    def _runs_after_prefix(self) -> bool:
        with eval_mode(self.model), torch.no_grad():
            return runs_after_prefix(self)

    def sublayer(self, index: int, residual: Float[Tensor, "b s d"], context: Context) -> Float[Tensor, "b s d"]:
        """One of a decoder layer's two sublayers (or the whole layer, a `block`), called as the model would call it."""
        sublayer = self.decomposition.sublayers[index]
        return self.decomposition.run(sublayer, residual, context.extra.arguments[sublayer.layer])

    def head(self, residual: Float[Tensor, "b s d"], context: Context) -> Float[Tensor, "b s vocab"]:
        """The model with every layer skipped and `residual` in place of the last one's output."""
        return self._run_head(residual, context)

    def logits_at(
        self, residual: Float[Tensor, "b s d"], context: Context, tokens: Int[Tensor, " kept"]
    ) -> Float[Tensor, "b kept vocab"]:
        """As `head`, by the model's own `logits_to_keep` where it has that."""
        tokens = tokens.to(residual.device)
        kept = {"logits_to_keep": tokens} if self.computes_kept_logits_alone else {}
        logits = self._run_head(residual, context, **kept)
        return logits if logits.shape[1] == len(tokens) else logits[:, tokens]

    @cached_property
    def computes_kept_logits_alone(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the model has transformers' `logits_to_keep`."""
        return "logits_to_keep" in inspect.signature(type(self.model).forward).parameters

    def _run_head(self, residual: Tensor, context: Context, **options: Any) -> Tensor:
        replaced = replace_calls(self._skipped_layers(residual))
        with without_autocast(self.model), not_recomputed(self.layers), replaced:
            return self.model(**context.extra.inputs, **options).logits

    def _skipped_layers(
        self,
        residual: Tensor | None = None,
        keep: Callable[[int, Tensor, CallArguments], None] = lambda *_: None,
    ) -> dict[nn.Module, Callable[..., Any]]:
        """Per layer, a call that computes nothing and returns the stream; the last returns `residual` if given."""
        last = len(self.layers) - 1

        def skip(index: int) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                hidden, rest = split_arguments(args, kwargs)
                keep(index, hidden, rest)
                out = hidden if residual is None or index < last else residual
                return as_output(out, self.decomposition.tuple_lengths[index])

            return call

        return {layer: skip(index) for index, layer in enumerate(self.layers)}

    def read_modules(self, index: int) -> list[nn.Module]:
        """The attention or MLP module of the sublayer, at `final` the unembedding.

        Both modules, for a block where both read its stream.
        """
        if index == len(self.decomposition.sublayers):
            return [self.model.get_output_embeddings()]  # pyright: ignore[reportCallIssue]
        modules = self.decomposition.sublayers[index].readers
        if not modules:
            readable = [
                site for site, one in zip(self.sites, self.decomposition.sublayers, strict=False) if one.readers
            ]
            raise ValueError(
                f"site={self.sites[index]!r} of {self.family} has no module that reads the stream; those that have one "
                f"are {', '.join([*readable, 'final'])}"
            )
        return modules

    def norm(self, index: int, reader: int = 0) -> Norm:
        """Measured on a float64 copy of the modules between the site and the module that reads it.

        The gain is exact in half precision too. ValueError if these are not a LayerNorm or an RMSNorm.
        """
        with eval_mode(self.model), torch.no_grad():
            norm = measure_norm(
                lambda streams: self._read(index, reader, streams), probe_vector(self.d_model, self.device)
            )
        if norm is None:
            name = self.sites[index]
            raise ValueError(f"site={name!r}: the module before the sublayer is not a LayerNorm or an RMSNorm")
        return norm._replace(gain=norm.gain.cpu().to(torch.promote_types(self.dtype, torch.float32)))

    def _read(self, index: int, reader: int, streams: Float[Tensor, "n d"]) -> Float[Tensor, "n d_read"]:
        """The input of a module that reads the site, given these streams at the site; computed in their dtype."""
        tokens = torch.zeros(len(streams), 1, dtype=torch.long, device=self.device)
        context: _BatchCalls = self.context(tokens).extra
        if index == len(self.decomposition.sublayers):
            skipped = self._skipped_layers(streams[:, None])
            return read_in_head(self.model, context.inputs, skipped, streams.dtype)[:, 0]
        number = self.decomposition.sublayers[index].layer
        layer, submodules = self.layers[number], self.decomposition.submodules[number]
        module = self.read_modules(index)[reader]
        with ExitStack() as stack:
            if layer in _SPLIT_LAYERS:  # a copy of the split forward would run the layer itself, and its hooks
                stack.enter_context(replaced_attribute(layer, "forward", _SPLIT_LAYERS[layer].forward))
            return read_in_layer(layer, submodules, module, context.arguments[number], streams[:, None])[:, 0]

    def hooked_module(self, index: int) -> nn.Module:
        """The site's layer, for `final` the last one."""
        sublayers = self.decomposition.sublayers
        return self.layers[sublayers[min(index, len(sublayers) - 1)].layer]

    def hook_modules(self, hooks: Mapping[nn.Module, HookFunction]) -> AbstractContextManager[None]:
        """As for any model; a hook raises ValueError where the backward pass would run its layer again without it."""
        return super().hook_modules({module: self._in_layer(module, hook) for module, hook in hooks.items()})

    def _in_layer(self, module: nn.Module, hook: HookFunction) -> HookFunction:
        layer = self._layer_of.get(module)
        if layer is None:
            return hook

        def checked(h: Tensor) -> Tensor | None:
            if layer.training and getattr(layer, "gradient_checkpointing", False):
                raise ValueError(
                    f"model={self.family!r} has gradient checkpointing on, so that the backward pass would run a layer "
                    "again without its hooks; call the model itself inside steer(), not a part of it, or call "
                    "model.gradient_checkpointing_disable()"
                )
            return hook(h)

        return checked

    @cached_property
    def _layer_of(self) -> dict[nn.Module, nn.Module]:
        """The layer of each module inside one."""
        return {module: layer for layer in self.layers for module in layer.modules()}

    @contextmanager
    def hook_residuals(self, hooks: Mapping[int, HookFunction]) -> Iterator[None]:
        """By hooks on the layers; for the stream between a layer's sublayers, the layer runs them in sequence."""
        sublayers = self.decomposition.sublayers
        with uncompiled(), ExitStack() as stack:
            for index, hook in hooks.items():
                if index == len(sublayers):
                    stack.callback(self.layers[-1].register_forward_hook(_output_hook(hook)).remove)
                elif index == 0 or sublayers[index - 1].layer != sublayers[index].layer:
                    layer = self.layers[sublayers[index].layer]
                    before = input_hook(hook, self.d_model)
                    stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
                else:
                    stack.enter_context(self._hook_between_sublayers(index, hook))
            yield

    @contextmanager
    def _hook_between_sublayers(self, index: int, hook: HookFunction) -> Iterator[None]:
        """Inside, a layer runs as its two sublayers with the hook between; hooks around the layer still run once.

        The layer's own forward comes back when the last hook is gone, in whatever order they go.
        """
        layer = self.layers[self.decomposition.sublayers[index].layer]
        if layer not in _SPLIT_LAYERS:
            split = _SplitLayer([], layer.forward, ExitStack())
            split.restore.enter_context(replaced_attribute(layer, "forward", self._split_forward(index, split)))
            _SPLIT_LAYERS[layer] = split
        split = _SPLIT_LAYERS[layer]
        split.hooks.append(hook)
        try:
            yield
        finally:
            split.hooks.remove(hook)
            if not split.hooks:
                split.restore.close()
                del _SPLIT_LAYERS[layer]

    def _split_forward(self, index: int, split: _SplitLayer) -> Callable[..., Any]:
        first, second = self.decomposition.sublayers[index - 1 : index + 1]
        length = self.decomposition.tuple_lengths[first.layer]

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, arguments = split_arguments(args, kwargs)
            middle = self.decomposition.run(first, hidden, arguments, split.forward)
            for hook in split.hooks:
                changed = hook(middle)
                middle = middle if changed is None else changed
            return as_output(self.decomposition.run(second, middle, arguments, split.forward), length)

        return forward


def _output_hook(hook: HookFunction) -> Callable[..., Any]:
    """A forward hook that gives a layer's output stream to `hook`, and puts what it returns in its place."""

    def forward_hook(_module: nn.Module, _args: tuple, output: Any) -> Any:
        changed = hook(output_hidden(output))
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return forward_hook
