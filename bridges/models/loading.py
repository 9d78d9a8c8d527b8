"""Models as users name them, and models left as they were found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.hub import cached_file

from bridges.models.huggingface.adapter import HuggingFaceResidual
from bridges.models.residual import ResidualModel
from bridges.models.sparse.model import SparseTransformer
from bridges.models.sparse.openai import RELEASE_CONFIG
from bridges.models.sparse.residual import SparseResidual


def load_model(source: nn.Module | str | Path, device: torch.device | None = None, **kwargs: Any) -> nn.Module:
    """The model itself, or the one at a path or hub id, in evaluation mode.

    A model object stays where it is; a loaded one goes to `device` unless `device_map` is among `kwargs`, which
    `from_pretrained` gets (dtype, device_map, revision). OSError where nothing is found; no remote code is run.
    """
    if isinstance(source, nn.Module):
        return source
    if not isinstance(source, str | Path):
        raise ValueError(f"model={source!r} is neither a model object nor a path or hub id")
    if not Path(source).is_dir() and (str(source).startswith((".", "/", "~")) or str(source).count("/") > 1):
        raise OSError(f"path={str(source)!r} is neither a model's folder nor a hub id (owner/name)")
    released = (Path(source) / RELEASE_CONFIG).is_file()
    loader = SparseTransformer if released else AutoModelForCausalLM
    model = loader.from_pretrained(str(source), **kwargs)
    return model if "device_map" in kwargs or device is None else model.to(device)  # pyright: ignore


def find_tokenizer(source: nn.Module | ResidualModel | str | Path) -> Any:
    """The tokenizer that lies with a model (or in the folder an object was loaded from), None without one.

    Its files are looked for first, on the hub too: without them transformers makes an empty tokenizer of a kind that it
    guesses.
    """
    source = source.model if isinstance(source, ResidualModel) else source
    place = getattr(getattr(source, "config", None), "name_or_path", "") if isinstance(source, nn.Module) else source
    if not place or (isinstance(source, nn.Module) and not Path(place).is_dir()):
        return None
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
    there = (cached_file(str(place), name, _raise_exceptions_for_missing_entries=False) for name in names)
    return AutoTokenizer.from_pretrained(str(place)) if any(there) else None


def as_residual(
    model: nn.Module | ResidualModel | str | Path, device: torch.device | None = None, **kwargs: Any
) -> ResidualModel:
    """See a decoder-only language model as a chain of sublayers on one residual stream (method, section 1).

    `model`: a model object, a `ResidualModel` (returned as it is), a folder or a hub id, which is loaded as
    `load_model` does, with `device` and `kwargs`. A `SparseTransformer` is its own chain; any other Hugging Face causal
    language model is taken apart and proven equal to itself. ValueError where that fails, OSError where nothing is
    found.
    """
    if isinstance(model, ResidualModel):
        return model
    model = load_model(model, device, **kwargs)
    if isinstance(model, SparseTransformer):
        return SparseResidual(model)
    return HuggingFaceResidual(model)
