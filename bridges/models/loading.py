"""Models as users name them: an object, a `ResidualModel`, a folder or a hub id."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.hub import cached_file

from bridges.io.paths import local_folder
from bridges.models.huggingface.adapter import HuggingFaceResidual
from bridges.models.residual import ResidualModel
from bridges.models.sparse.model import SparseTransformer
from bridges.models.sparse.openai import RELEASE_CONFIG
from bridges.models.sparse.residual import SparseResidual

ModelSource = nn.Module | ResidualModel | str | PathLike[str]
"""How a model may be given to any public function."""

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt"),
    *("tokenizer.model", "spiece.model"),
)


def load_model(source: ModelSource, device: torch.device | str | None = None, **kwargs: Any) -> nn.Module:
    """The model object that `source` is or holds, or the one at a folder or hub id, loaded in evaluation mode.

    An object stays on its device and in its mode. A loaded model goes to `device`, unless `kwargs`, which are those of
    `from_pretrained` (dtype, device_map, revision, ...), have a `device_map`. No remote code is run. Raises OSError
    where nothing is found, ValueError where `source` is of another kind.
    """
    if isinstance(source, ResidualModel):
        return source.model
    if isinstance(source, nn.Module):
        return source
    if not isinstance(source, str | PathLike):
        raise ValueError(f"model={source!r} must be a model object, a ResidualModel, a folder or a hub id")
    folder = local_folder(source)
    released = folder is not None and (folder / RELEASE_CONFIG).is_file()
    loader = SparseTransformer if released else AutoModelForCausalLM
    model = loader.from_pretrained(str(source if folder is None else folder), **kwargs)
    return model if "device_map" in kwargs or device is None else model.to(device)  # pyright: ignore


def find_tokenizer(source: ModelSource) -> Any:
    """The tokenizer in a model's folder or hub repository, None where there is none.

    For an object or a `ResidualModel`: in the folder that it was loaded from, if that is a local one. The files are
    looked for first: without them transformers makes an empty tokenizer of a kind that it guesses.
    """
    if isinstance(source, nn.Module | ResidualModel):
        path = getattr(getattr(load_model(source), "config", None), "name_or_path", "")
        if not path or not Path(path).is_dir():
            return None
    else:
        path = local_folder(source) or source
    found = (cached_file(str(path), name, _raise_exceptions_for_missing_entries=False) for name in _TOKENIZER_FILES)
    return AutoTokenizer.from_pretrained(str(path)) if any(found) else None


def as_residual(model: ModelSource, device: torch.device | str | None = None, **kwargs: Any) -> ResidualModel:
    """Return a decoder-only language model as a `ResidualModel`, a chain of sublayers (method.md, section 1).

    Args:
        model: a Hugging Face causal language model or a `SparseTransformer`, compiled by `torch.compile` or not; a
            `ResidualModel`, returned as it is; a folder; or a hub id. Weights are shared with the model, not copied.
        device: where a model goes that is loaded from a folder or the hub; an object stays where it is.
        kwargs: of `from_pretrained` (dtype, device_map, revision, ...), for a model that is loaded.

    Returns:
        The `ResidualModel`. For a Hugging Face model its logits were compared with the model's own on random tokens:
        equal bit for bit in float32 on CPUs. A `SparseTransformer` is such a chain itself: nothing is compared. Of a
        compiled model it is the model inside, not compiled.

    Raises:
        ValueError: the model is not a plain sequence of decoder layers; the message names the layer and the difference.
        OSError: nothing is found at the folder or hub id.

    >>> import bridges, torch
    >>> dense = bridges.load_pair().dense
    >>> residual_model = bridges.as_residual(dense)
    >>> residual_model.sites
    ['0.attn', '0.mlp', '1.attn', '1.mlp', 'final']
    >>> input_ids = torch.tensor([[5, 17, 4]])
    >>> residuals, logits = residual_model.residuals(input_ids)
    >>> residuals[0].shape
    torch.Size([1, 3, 64])
    >>> torch.equal(residual_model.run_from("1.attn", residuals[2], input_ids), dense(input_ids).logits)
    True
    """
    if isinstance(model, ResidualModel):
        return model
    loaded = load_model(model, device, **kwargs)
    module: nn.Module = getattr(loaded, "_orig_mod", loaded)  # of torch.compile
    if isinstance(module, SparseTransformer):
        return SparseResidual(module)
    return HuggingFaceResidual(module)
