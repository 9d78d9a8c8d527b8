"""What the hooks know of the forward call that is running, and the hooks that depend on it.

Read: the sublayer's input, after the norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from bridges.models.residual import HookFunction
from bridges.steering.edits import SiteEdit
from bridges.steering.positions import TokenSpan
from bridges.steering.readings import Readings, encoder_reading


@dataclass(frozen=True, eq=False)
class CallState:
    """One forward call of the steered model."""

    span: TokenSpan
    readings: Readings
    """A site whose reading is missing when the call begins gets it from the stream during the call."""


class CurrentCall:
    """Holds the state of the call that is running, and nothing between calls."""

    def __init__(self, model: nn.Module):
        self._model_name = type(model).__name__
        self._state: CallState | None = None

    @contextmanager
    def running(self, state: CallState) -> Iterator[None]:
        """Inside, the hooks use this state; afterwards that of the call around it, if a hook made this one."""
        before, self._state = self._state, state
        try:
            yield
        finally:
            self._state = before

    @property
    def state(self) -> CallState:
        """Raises ValueError outside a call: what an earlier call left would be of other tokens."""
        if self._state is None:
            raise ValueError(
                f"model={self._model_name}: a part of it ran outside a call of the whole model; call the model "
                "itself inside steer(), since the edits depend on the tokens it is given"
            )
        return self._state


def change_hook(site_edit: SiteEdit, unit: Float[Tensor, "channels d"], current: CurrentCall) -> HookFunction:
    """Add what a site's edits change at each token of the call; `unit` is what one read unit of a channel adds."""

    def hook(h: Tensor) -> Tensor:
        state = current.state
        change = site_edit.change(state.span, state.readings.get(site_edit.dense_site))
        added = (change @ unit.to(change)).to(h)
        return h + added[:, -h.shape[1] :]  # the head reads the last tokens alone where logits_to_keep says so

    return hook


def encode_hook(site_edit: SiteEdit, then: HookFunction | None, current: CurrentCall) -> HookFunction:
    """Read the stream through the encoder, unless the call has the site's reading already; go on with another hook."""

    def hook(h: Tensor) -> Tensor | None:
        readings = current.state.readings
        if site_edit.dense_site not in readings:
            readings[site_edit.dense_site] = encoder_reading(site_edit, h)
        return None if then is None else then(h)

    return hook
