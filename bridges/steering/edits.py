"""Edit: what to do to one readable channel of the sparse model, as plain data that saves and loads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridges.bridge import BridgeSet
from bridges.io.files import read_json, write_json
from bridges.models.loading import as_residual
from bridges.models.modes import frozen
from bridges.models.residual import ResidualModel, check_tokens
from bridges.steering.delta import changed_reads

Mode = Literal["set", "add", "scale"]
NAMES = ("site", "channel", "value", "mode", "positions")


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of one channel of the sparse model's read at one site (method, section 4).

    ValueError names a field that cannot be.
    """

    site: str
    """The bridge, by its sparse site: "1.attn"."""
    channel: int
    """A coordinate of the sparse residual stream."""
    value: float | int | Float[Tensor, "batch seq"]
    """In read units: a number, or with mode "add" one per token of the prompts, padding included."""
    mode: Mode = "set"
    """What becomes of a reading v: `value`, v + `value` or v * `value`."""
    positions: int | Sequence[int] | None = None
    """None: every position, generated ones included. Integers index a row's real tokens from 0, negative ones from the
    prompt's end."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode={self.mode!r} must be one of {', '.join(get_args(Mode))}")
        if not isinstance(self.site, str):
            raise ValueError(f"site={self.site!r} must be the name of a sparse site, as '1.attn'")
        if isinstance(self.channel, bool) or not isinstance(self.channel, Integral) or self.channel < 0:
            raise ValueError(f"channel={self.channel!r} must be an index of the sparse stream, 0 or more")
        object.__setattr__(self, "channel", int(self.channel))  # numpy's integers are no int
        if isinstance(self.value, Tensor):
            self._check_tensor(self.value)
        elif isinstance(self.value, bool) or not isinstance(self.value, Real) or not math.isfinite(self.value):
            raise ValueError(f"value={self.value!r} must be a finite number or a tensor [batch, seq]")
        elif not isinstance(self.value, int | float):
            object.__setattr__(self, "value", float(self.value))
        if self.positions is not None:
            positions: Any = self.positions
            if isinstance(positions, Tensor | np.ndarray):
                positions = positions.tolist()
            positions = list(positions) if isinstance(positions, Iterable) else [positions]
            if not all(isinstance(p, Integral) and not isinstance(p, bool) for p in positions):
                raise ValueError(f"positions={self.positions!r} must be integers or None")
            object.__setattr__(self, "positions", tuple(int(p) for p in positions))

    def _check_tensor(self, value: Tensor) -> None:
        if value.ndim != 2 or not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(f"value={tuple(value.shape)} of {value.dtype} must be finite numbers [batch, seq]")
        if self.mode != "add":
            raise ValueError(f"mode={self.mode!r} takes one number as value; a value per token goes with mode='add'")
        if self.positions is not None:
            raise ValueError(f"positions={self.positions!r} and a value per token exclude each other; put zeros in it")

    @property
    def constant(self) -> bool:
        """Whether the edit adds one number everywhere: it then needs no reading and knows no positions."""
        return self.mode == "add" and self.positions is None and not isinstance(self.value, Tensor)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, a tensor as nested lists."""
        value = self.value.tolist() if isinstance(self.value, Tensor) else self.value
        positions = None if self.positions is None else list(self.positions)  # pyright: ignore[reportArgumentType]
        return dict(zip(NAMES, (self.site, self.channel, value, self.mode, positions), strict=True))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Edit:
        """The inverse of `to_dict`; ValueError for a key that is unknown or missing."""
        if wrong := sorted(values.keys() ^ set(NAMES)):
            raise ValueError(f"an edit has the keys {', '.join(NAMES)}; {wrong[0]!r} is unknown or missing")
        value = _tensor(values["value"]) if isinstance(values["value"], list) else values["value"]
        return cls(**{**values, "value": value})


def _tensor(rows: list) -> Float[Tensor, "batch seq"]:
    """float32 where that holds every number, else float64."""
    equal = all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows)
    if not equal or not all(isinstance(number, int | float) for row in rows for number in row):
        raise ValueError(f"value={str(rows)[:40]}... must be one number, or rows of numbers that are equally long")
    wide = torch.tensor(rows, dtype=torch.float64)
    return narrow if torch.equal((narrow := wide.float()).double(), wide) else wide


def as_edit_list(edits: Edit | Sequence[Edit]) -> list[Edit]:
    """A list, of one edit too."""
    return list(edits) if isinstance(edits, Iterable) else [edits]


def save_edits(edits: Edit | Sequence[Edit], path: str | Path) -> None:
    """Write edits as JSON."""
    write_json(path, {"edits": [edit.to_dict() for edit in as_edit_list(edits)]})


def load_edits(path: str | Path) -> list[Edit]:
    """Read what `save_edits` wrote; ValueError names a file that is something else."""
    content = read_json(path)
    found = content.get("edits") if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(isinstance(values, dict) for values in found):
        raise ValueError(f"{path} holds no edits; it must be JSON with a list of objects under 'edits'")
    try:
        return [Edit.from_dict(values) for values in found]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_edits(bridge_set: BridgeSet, edits: Sequence[Edit], strength: float = 1.0) -> None:
    """ValueError unless the bridges can push these edits into a dense model."""
    if not isinstance(strength, Real) or not math.isfinite(strength):
        raise ValueError(f"strength={strength!r} must be a finite number")
    for edit in edits:
        if not isinstance(edit, Edit):
            raise ValueError(f"edits holds {edit!r}; it must be an Edit or a list of them")
        if edit.site not in bridge_set.sites:
            raise ValueError(f"site={edit.site!r} has no bridge; there are {', '.join(bridge_set.sites)}")
        bridge = bridge_set[edit.site]
        if edit.channel >= len(bridge.gain_sparse):
            raise ValueError(f"channel={edit.channel} is over the sparse stream's {len(bridge.gain_sparse)} channels")
        if bridge.gain_sparse[edit.channel] == 0:
            raise ValueError(
                f"channel={edit.channel} at site={edit.site!r} has gain 0: no read shows it, so none can edit it"
            )
        units = torch.stack([bridge.rms_dense, bridge.rms_sparse, bridge.gain_sparse[edit.channel].double()])
        if units.isnan().any():
            raise ValueError(
                f"site={edit.site!r}: R and the gain were not measured; bridges that fit() returns have them"
            )


def counterfactual(
    sparse: nn.Module | ResidualModel,
    site: str,
    channel: int,
    input_ids: Int[Tensor, "batch seq"],
    counterfactual_ids: Int[Tensor, "batch seq_too"],
    attention_mask: Int[Tensor, "batch seq"] | None = None,
) -> Edit:
    """The edit that gives a channel the reading it would have on another prompt, token by token (paper A.4).

    dn[t] = n^s_counterfactual[t] - n^s_presented[t] in read units, of both prompts through the sparse model; zero on
    padding and after the prompt. ValueError unless the prompts have one shape.
    """
    chain = as_residual(sparse)
    index = chain.index(site)
    if not isinstance(channel, Integral) or not 0 <= channel < chain.d_model:
        raise ValueError(
            f"channel={channel!r} must lie between 0 and {chain.d_model - 1}, the sparse stream's channels"
        )
    for name, ids in (("input_ids", input_ids), ("counterfactual_ids", counterfactual_ids)):
        check_tokens(name, ids, None, chain, least=1)
    with frozen(chain.model), torch.no_grad():
        dn = changed_reads(chain, input_ids, counterfactual_ids, attention_mask)[index]
    return Edit(site, channel, dn[..., channel], "add")
