"""Keys and values of the tokens that rows begin with, kept so that many passes run the tokens after them alone.

A causal model computes the same for the tokens before the first edited one whatever the edit is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class PrefixCache(DynamicCache):
    """Attention's keys and values of some first tokens.

    Filled by one pass over those tokens; when `full`, a pass attends to them and adds nothing.
    """

    full = False

    @property
    def bytes_per_token(self) -> int:
        """Of one row's keys and values, once there are any."""
        layers: list[Any] = self.layers
        tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None]
        return sum(tensor.nbytes // (tensor.shape[0] * tensor.shape[-2]) for tensor in tensors)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values that one layer attends to: those kept, then the given ones."""
        if not self.full:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer: Any = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], dim=-2), torch.cat([layer.values, value_states], dim=-2)


def keeps_keys_and_values(cache: Any) -> bool:
    """Whether a model's own cache holds keys and values alone, of all tokens or of a window, and no other state."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and all(type(layer) in kinds for layer in cache.layers)
