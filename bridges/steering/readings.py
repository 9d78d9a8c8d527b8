"""The readings of channels that edits set or scale: the sparse model's, or the encoder's of the dense stream.

Reading: the value of a channel in the read, which is the sublayer's input after the norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache

from bridges.models.modes import eval_mode
from bridges.models.residual import HookFunction, ResidualModel
from bridges.steering.companion import Companion, model_lock
from bridges.steering.edits import SiteEdit
from bridges.steering.model_call import ModelCall

Readings = dict[int, Tensor]
"""By dense site: [batch, seq, channels], the new tokens' reading of the site's edited channels. No gradient."""


class CompanionReader:
    """Runs the sparse model, or the unedited dense one for the encoder, on each call's tokens and reads channels."""

    def __init__(self, residual_model: ResidualModel, from_encoder: bool):
        self.residual_model, self.from_encoder = residual_model, from_encoder
        self.companion = Companion(residual_model.model, same_call=from_encoder)

    def read(self, call: ModelCall, site_edits: Sequence[SiteEdit]) -> tuple[Readings, Cache | None]:
        """The readings at these sites, and the companion's own cache, None for a call without a cache."""
        readings: Readings = {}
        with (
            model_lock(self.residual_model.model),
            eval_mode(self.residual_model.model),
            self._hooks(site_edits, readings),
        ):
            return readings, self.companion.run(self._known(call))

    def _known(self, call: ModelCall) -> ModelCall:
        """The call with tokens that the model has: its vocabulary may lack the dense model's last ones."""
        if self.from_encoder:
            return call
        unknown = call.input_ids >= self.residual_model.vocab_size
        if call.attention_mask is not None:
            padding = unknown & (call.attention_mask[:, call.n_past :] == 0).to(unknown.device)
            unknown, call = unknown & ~padding, replace(call, input_ids=call.input_ids.masked_fill(padding, 0))
        if unknown.any():
            raise ValueError(
                f"input_ids holds token {int(call.input_ids[unknown][0])}, but the sparse model has tokens 0 to "
                f"{self.residual_model.vocab_size - 1}; where it fills rows that have ended, pass generate another "
                "pad_token_id"
            )
        return call

    def _hooks(self, site_edits: Sequence[SiteEdit], readings: Readings) -> AbstractContextManager[None]:
        def keep(site_edit: SiteEdit) -> HookFunction:
            def hook(seen: Tensor) -> None:
                reading = encoder_reading(site_edit, seen) if self.from_encoder else seen[..., site_edit.channels]
                readings[site_edit.dense_site] = reading.detach()

            return hook

        if self.from_encoder:
            return self.residual_model.hook_residuals({one.dense_site: keep(one) for one in site_edits})
        hooks = {one.sparse_site: keep(one) for one in site_edits if one.sparse_site is not None}
        return self.residual_model.hook_reads(hooks)


@torch.no_grad()
def encoder_reading(site_edit: SiteEdit, h: Float[Tensor, "b s d_dense"]) -> Float[Tensor, "b s channels"]:
    """v = gain_s z / R_s with z = f(h): the encoder's reading of the unedited dense stream (method.md, section 4)."""
    bridge = site_edit.bridge
    z = bridge.encode_at(h.detach().to(bridge.encoder_weight.device), site_edit.channels)
    return (z * site_edit.read_unit).to(h.device)
