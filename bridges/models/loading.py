"""Models as users name them: an object, a `ResidualModel`, a folder or a hub id."""

from __future__ import annotations

from importlib.util import find_spec
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
from bridges.models.wrapped import inner_model

ModelSource = nn.Module | ResidualModel | str | PathLike[str]
"""How a model may be given to any public function; a path may also be that of a GGUF file."""

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt"),
    *("tokenizer.model", "spiece.model"),
)


_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt")


def load_model(source: ModelSource, device: torch.device | str | None = None, **kwargs: Any) -> nn.Module:
    """The model object that `source` is or holds, or the one at a folder or hub id, loaded in evaluation mode.

    An object stays on its device and in its mode. A loaded model goes to `device`, unless `kwargs`, which are those of
    `from_pretrained` (dtype, device_map, revision, gguf_file, ...), have a `device_map`. A GGUF file, or a folder whose
    only weights are one, is read into float32. No remote code is run. Raises OSError where nothing is found, ValueError
    where `source` is of another kind.
    """
    if isinstance(source, ResidualModel):
        return source.model
    if isinstance(source, nn.Module):
        return source
    if not isinstance(source, str | PathLike):
        raise ValueError(f"model={source!r} must be a model object, a ResidualModel, a folder or a hub id")
    path, gguf = (local_folder(source) or str(source), None) if "gguf_file" in kwargs else _locate(source)
    if gguf is not None:
        _require_gguf(source)
        kwargs = {**kwargs, "gguf_file": gguf}
    released = isinstance(path, Path) and (path / RELEASE_CONFIG).is_file()
    given = released or not kwargs.keys().isdisjoint(("gguf_file", "config", "subfolder"))
    if isinstance(path, Path) and not given and not (path / "config.json").is_file():
        raise ValueError(
            f"path={str(source)!r} holds no model: it has no config.json; give a folder that save_pretrained wrote, or "
            "a hub id"
        )
    if isinstance(path, Path) and not given and (path / "bridges.safetensors").is_file():
        raise ValueError(
            f"path={str(source)!r} holds bridges, not a model; give the folder or hub id of one of their models"
        )
    loader = SparseTransformer if released else AutoModelForCausalLM
    model = loader.from_pretrained(str(path), **kwargs)
    if isinstance(path, Path) and "gguf_file" in kwargs:  # the name that is recorded, and where its tokenizer is
        model.config._name_or_path = str(path / kwargs["gguf_file"])  # pyright: ignore
    return model if "device_map" in kwargs or device is None else model.to(device)  # pyright: ignore


def _locate(source: str | PathLike[str]) -> tuple[Path | str, str | None]:
    """The folder or hub id to load from; and the GGUF file's name, where `source` is one or has no other weights."""
    file = Path(source).expanduser()
    if file.suffix == ".gguf" and not file.is_dir():
        if not file.is_file():
            raise FileNotFoundError(f"path={str(source)!r} must be a GGUF file that exists")
        return file.parent, file.name
    folder = local_folder(source)
    if folder is None:
        return str(source), None
    files = [] if any(any(folder.glob(pattern)) for pattern in _WEIGHT_FILES) else sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(f"path={str(source)!r} holds {len(files)} GGUF files; give one, such as {str(files[0])!r}")
    return folder, files[0].name if files else None


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def _require_gguf(source: str | PathLike[str]) -> None:
    if find_spec("gguf") is None:
        raise ValueError(
            f"path={str(source)!r} is read with the package gguf, which is not installed; "
            "pip install 'sparse-bridges[gguf]'"
        )


def find_tokenizer(source: ModelSource) -> Any:
    """The tokenizer in a model's folder, GGUF file or hub repository, None where there is none.

    For an object or a `ResidualModel`: in the folder or file that it was loaded from, if that is a local one. The files
    are looked for first: without them transformers makes an empty tokenizer of a kind that it guesses.
    """
    if isinstance(source, nn.Module | ResidualModel):
        name = getattr(getattr(load_model(source), "config", None), "name_or_path", "")
        return find_tokenizer(name) if name and (Path(name).is_dir() or _is_gguf(Path(name))) else None
    path = Path(source).expanduser()
    folder = path.parent if _is_gguf(path) else local_folder(source) or source
    found = (cached_file(str(folder), name, _raise_exceptions_for_missing_entries=False) for name in _TOKENIZER_FILES)
    if any(found):
        return AutoTokenizer.from_pretrained(str(folder))
    files = [path] if _is_gguf(path) else sorted(path.glob("*.gguf"))
    if len(files) != 1:
        return None
    _require_gguf(files[0])
    return AutoTokenizer.from_pretrained(str(folder), gguf_file=files[0].name)


def as_residual(model: ModelSource, device: torch.device | str | None = None, **kwargs: Any) -> ResidualModel:
    """Return a decoder-only language model as a `ResidualModel`, a chain of sublayers (method.md, section 1).

    Args:
        model: a Hugging Face causal language model or a `SparseTransformer`; a module that wraps one (PEFT, compiled,
            `DataParallel`); a `ResidualModel`, returned as it is; a folder; or a hub id. Weights are shared with the
            model, not copied.
        device: where a model goes that is loaded from a folder or the hub; an object stays where it is.
        kwargs: of `from_pretrained` (dtype, device_map, revision, ...), for a model that is loaded.

    Returns:
        The `ResidualModel`. For a Hugging Face model its logits were compared with the model's own on random tokens:
        equal bit for bit in float32 on CPUs. A `SparseTransformer` is such a chain itself: nothing is compared. Of a
        wrapper it is the innermost language model, not compiled.

    Raises:
        ValueError: the model is not a plain sequence of decoder layers; the message names the layer and the difference.
            Or its weights are sharded over processes, or are those of a `SparseTransformer` and offloaded.
        OSError: nothing is found at the folder or hub id.

    >>> import bridges, torch
    >>> dense = bridges.load_pair().dense
    >>> residual_model = bridges.as_residual(dense)
    >>> residual_model.sites
    ['0.attn', '0.mlp', '1.attn', '1.mlp', 'final']
    >>> input_ids = torch.tensor([[5, 17, 4]])
    >>> residuals, logits = residual_model.residuals(input_ids)
    >>> residuals[0].shape
    torch.Size([1, 3, 128])
    >>> torch.equal(residual_model.run_from("1.attn", residuals[2], input_ids), dense(input_ids).logits)
    True
    """
    loaded = load_model(model, device, **kwargs)
    _refuse_sharded(loaded)
    if isinstance(model, ResidualModel):
        return model
    module = inner_model(loaded)
    if isinstance(module, SparseTransformer):
        _refuse_offloaded(module)
        return SparseResidual(module)
    return HuggingFaceResidual(module)


def _refuse_sharded(model: nn.Module) -> None:
    """ValueError if this process holds parts of weights: DTensors, or the flat parameters of FSDP's wrapper."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
    from torch.distributed.tensor import DTensor

    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        found = "its parameters are DTensors, of fully_shard or tensor parallelism"
    elif any(
        isinstance(part, FullyShardedDataParallel) and part.sharding_strategy != ShardingStrategy.NO_SHARD
        for part in model.modules()
    ):
        found = "FullyShardedDataParallel holds its parameters"
    else:
        return
    raise ValueError(
        f"model={type(model).__name__} is sharded over processes ({found}), while sublayers run and norms are copied "
        "one by one; load it unsharded, with device_map='auto' over several devices where it does not fit on one"
    )


def _refuse_offloaded(model: SparseTransformer) -> None:
    """ValueError if accelerate brings weights for modules' calls: a chain of sublayers calls the model's functions."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta and any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise ValueError(
                f"parameter {name!r} of a SparseTransformer is offloaded, which works for Hugging Face models alone; "
                "load it onto one device, without a device_map that offloads"
            )
