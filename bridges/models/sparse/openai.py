"""The two published layouts of the circuit-sparsity checkpoints (method.md, section 8), read without running their
code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from bridges.io.tensors import read_keys, read_safetensors_folder, read_torch_file
from bridges.models.sparse.config import SparseConfig

RELEASE_CONFIG = "beeg_config.json"
RELEASE_WEIGHTS = "final_model.pt"
HUB_MODEL_TYPE = "circuitgpt"
HUB_PREFIX = "circuit_model."

_DEFAULTS = {
    "n_head": 12,
    "rms_norm": False,
    "afrac": None,
    "afrac_loctypes": "attn_in,attn_out,mlp_in,mlp_out",
    "tied_unembed": True,
    "tokenizer_name": "tinypython_2k",
    "sink": False,
}
"""Values of keys that a published file leaves out, where they differ from the defaults of `SparseConfig`."""


def published_config(keys: Mapping[str, Any], where: Path | str) -> SparseConfig:
    """The configuration with a published file's keys; ValueError names the file and the unknown key."""
    # auto_map names remote code, which is not run. tied_unembed says whether embeddings are tied; transformers wrote
    # its own default as tie_word_embeddings.
    left_out = ("auto_map", "model_type", "tie_word_embeddings")
    given = {key: value for key, value in keys.items() if key not in left_out}
    try:
        return SparseConfig(**{**_DEFAULTS, **given})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def read_release(folder: Path) -> tuple[SparseConfig, dict[str, Tensor], Path]:
    """From `beeg_config.json` and `final_model.pt`: the configuration, the tensors, and the file they came from."""
    config = published_config(read_keys(folder / RELEASE_CONFIG), folder / RELEASE_CONFIG)
    weights = folder / RELEASE_WEIGHTS
    return config, _named_as_ours(read_torch_file(weights), config, weights), weights


def read_hub(folder: Path) -> tuple[SparseConfig, dict[str, Tensor], Path]:
    """From `config.json` of type circuitgpt and safetensors: the configuration, the tensors, and the folder."""
    config = published_config(read_keys(folder / "config.json"), folder / "config.json")
    tensors: dict[str, Tensor] = {}
    for name, tensor in read_safetensors_folder(folder).items():
        if not name.startswith(HUB_PREFIX):
            raise ValueError(f"{folder}: the tensor {name} is not expected; every name must begin with {HUB_PREFIX}")
        tensors[name.removeprefix(HUB_PREFIX)] = tensor
    return config, _named_as_ours(tensors, config, folder), folder


def _named_as_ours(tensors: dict[str, Tensor], config: SparseConfig, where: Path) -> dict[str, Tensor]:
    """The tensors without causal masks and the second copy of tied embeddings; a missing final_logits_bias is zero."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(".attn.bias")}
    embedding, unembedding = "transformer.wte.weight", "lm_head.weight"
    if config.tied_unembed and unembedding in kept:
        last = kept.pop(unembedding)
        if not torch.equal(kept.setdefault(embedding, last), last):
            raise ValueError(f"{where}: tied_unembed is true, but {embedding} and {unembedding} differ")
    if "final_logits_bias" not in kept and embedding in kept:
        kept["final_logits_bias"] = kept[embedding].new_zeros(config.vocab_size)
    return kept


class CircuitGPTConfig(SparseConfig):
    """The configuration class of `circuitgpt` for `AutoConfig`, which then needs no remote code."""

    model_type = HUB_MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A `SparseConfig`, and with `return_unused_kwargs` the keyword arguments that were not used."""
        return SparseConfig.from_dict(published_config(config_dict, "config.json").to_dict(), **kwargs)


AutoConfig.register(HUB_MODEL_TYPE, CircuitGPTConfig, exist_ok=True)
