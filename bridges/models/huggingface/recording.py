"""Recorded forward passes of an unchanged Hugging Face model on a few random tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bridges.models.attention_mask import position_ids
from bridges.models.huggingface.calls import LayerCall, record_calls
from bridges.models.modes import replaced_attribute
from bridges.models.prefix import PrefixCache
from bridges.models.residual import input_device
from bridges.models.tokens import Batch

PROBE_ROWS, PROBE_TOKENS = 3, 8


class ForwardRecord(NamedTuple):
    """One forward pass of the unchanged model."""

    batch: Batch
    layers: list[LayerCall]
    logits: Tensor
    counted: Tensor
    """[batch, seq], True at the tokens to compare: those that are not padding."""


def base_model(model: nn.Module) -> nn.Module:
    """The decoder without its unembedding."""
    return getattr(model, "base_model", model)


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Inside, a model that accelerate prepared for mixed precision runs in the precision of its weights.

    accelerate wraps its forward in autocast, while a chain calls its layers outside that.
    """
    own = vars(model).get("_original_forward")
    with nullcontext() if own is None else replaced_attribute(model, "forward", own):
        yield


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model, which may be a part of the whole one's; None without one."""
    config = getattr(model, "config", None)
    return config if config is None else config.get_text_config(decoder=True)


def model_inputs(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, prefix: PrefixCache | None = None
) -> dict[str, Any]:
    """Keyword arguments of a forward pass, with positions that follow the mask as in `generate`.

    Without a cache, or after the tokens of a `prefix`. Where the mask covers more tokens than there are, these are its
    last ones.
    """
    device = input_device(model)
    inputs: dict[str, Any] = {"input_ids": input_ids.to(device), "use_cache": prefix is not None}
    if prefix is not None:
        inputs["past_key_values"] = prefix
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask.to(device)
        forwards = [type(module).forward for module in (model, base_model(model))]
        if any("position_ids" in inspect.signature(forward).parameters for forward in forwards):
            inputs["position_ids"] = position_ids(inputs["attention_mask"])[:, -input_ids.shape[1] :]
    return inputs


def probe_batches(model: nn.Module) -> list[Batch]:
    """The same random tokens twice: without a mask, and with padding on the left of one row and the right of another.

    Drawn from a generator of its own, so that the global one does not advance.
    """
    generator = torch.Generator().manual_seed(0)
    vocab = model.get_input_embeddings().weight.shape[0]  # pyright: ignore
    tokens = torch.randint(vocab, (PROBE_ROWS, PROBE_TOKENS), generator=generator)
    while (placeholders := torch.isin(tokens, _placeholders(model))).any():
        tokens[placeholders] = torch.randint(vocab, (int(placeholders.sum()),), generator=generator)
    tokens = tokens.to(input_device(model))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    mask[2, -2:] = 0
    return [(tokens, None), (tokens, mask)]


def _placeholders(model: nn.Module) -> Tensor:
    """The token ids in place of which a multimodal model puts images or sound."""
    config = getattr(model, "config", None)
    if config is text_config(model):
        return torch.tensor([])
    ids = [value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index"))]
    return torch.tensor([one for one in ids if isinstance(one, int)])


def record_forward(model: nn.Module, layers: list[nn.Module], batch: Batch) -> ForwardRecord:
    """Run the unchanged model and record the call of every layer.

    ValueError where layers share a module, or a layer's stream is not [batch, seq, d_model].
    """
    input_ids, attention_mask = batch
    with record_calls(layers) as calls, without_autocast(model):
        logits = model(**model_inputs(model, input_ids, attention_mask)).logits
    family = model.config.model_type  # pyright: ignore
    if len(calls) < len(layers):
        raise ValueError(
            f"model={family!r} cannot be split into sublayers: {len(layers)} decoder layers, but {len(calls)} "
            "different ones are called with the stream"
        )
    for i, layer in enumerate(layers):
        if calls[layer].hidden.shape[:-1] != input_ids.shape:
            shape = list(calls[layer].hidden.shape)
            raise ValueError(
                f"model={family!r} cannot be split into sublayers: layer {i} is given a stream of shape {shape}, not "
                "[batch, seq, d_model]"
            )
    if attention_mask is None:
        counted = torch.ones_like(input_ids, dtype=torch.bool)
    else:
        # Eager attention (Gemma 2, Bloom) gives NaN on left padding in float64: such a row cannot be compared.
        counted = attention_mask.bool() & logits.isfinite().all(-1)
    return ForwardRecord(batch, [calls[layer] for layer in layers], logits, counted)
