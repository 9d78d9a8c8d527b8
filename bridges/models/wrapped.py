"""The language model inside wrappers: PEFT's, torch.compile's, DataParallel, a user's own module."""

from __future__ import annotations

from torch import nn


def inner_model(model: nn.Module) -> nn.Module:
    """The innermost language model of `model`; `model` itself where nothing wraps it.

    A wrapper's `generate` may call the model inside it directly, so hooks must stand there. Raises ValueError where a
    wrapper holds several language models, for an encoder-decoder, and for a model with virtual tokens.
    """
    while True:
        _refuse_encoder(model)
        inside = _wrapped_model(model)
        if inside is None:
            return model
        _refuse_virtual_tokens(model)
        model = inside


def _refuse_encoder(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        kind = getattr(config, "model_type", type(model).__name__)
        raise ValueError(
            f"model={kind!r} is an encoder-decoder ({type(model).__name__}); bridges need a decoder-only language "
            "model, as AutoModelForCausalLM loads it"
        )


def _refuse_virtual_tokens(model: nn.Module) -> None:
    """ValueError if a wrapper of PEFT puts tokens before every row: prefix and prompt tuning."""
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(
            f"model={type(model).__name__} puts {config.num_virtual_tokens} virtual tokens before every row, which "  # pyright: ignore
            "bridges and edits would not count; pass the model inside it (get_base_model()), whose rows have none"
        )


def _wrapped_model(model: nn.Module) -> nn.Module | None:
    """The outermost language model below `model` that it stands for, None where it is one itself."""
    own, found = unembedding(model), _outermost_inside(model)
    if own is not None:  # a model may also hold another, with an unembedding of its own (a draft, a depth decoder)
        found = [one for one in found if unembedding(one) is own]
    elif len(found) > 1:
        names = ", ".join(type(one).__name__ for one in found)
        raise ValueError(f"model={type(model).__name__} holds {len(found)} language models ({names}); pass one of them")
    return found[0] if found else None


def _outermost_inside(model: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in model.children():
        found += [child] if unembedding(child) is not None else _outermost_inside(child)
    return found


def unembedding(model: nn.Module) -> nn.Module | None:
    """The module that gives a model's logits, None where it has none."""
    return getattr(model, "get_output_embeddings", lambda: None)()
