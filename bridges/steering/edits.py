"""Edit: what to do to one channel of the sparse model, as plain data; SiteEdit: what the edits of a site change.

Read: the sublayer's input, after the norm. Reading: the value of a channel in the read, in read units.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from bridges.bridge import Bridge, BridgeSet
from bridges.io.files import read_json, write_json
from bridges.models.residual import ResidualModel
from bridges.steering.delta import EntryPoint, stream_to_read
from bridges.steering.positions import TokenSpan

Mode = Literal["set", "add", "scale"]
NAMES = ("site", "channel", "value", "mode", "positions")


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of one channel of the sparse model's read at one site (method.md, section 4).

    Edits are plain data: `steer` applies them, `save_edits` writes them. Raises ValueError naming the field that is
    not valid.

    >>> edit = Edit("1.attn", 7, 0.5, "add", positions=-1)
    >>> edit.to_dict()
    {'site': '1.attn', 'channel': 7, 'value': 0.5, 'mode': 'add', 'positions': [-1]}
    """

    site: str
    """The bridge, named by its sparse site: "1.attn"."""
    channel: int
    """The index of a channel of the sparse residual stream."""
    value: float | int | Float[Tensor, "batch seq"]
    """In read units: a number, or with mode "add" one per token of the prompts, padding included."""
    mode: Mode = "set"
    """What replaces the channel's reading v: `value` (set), v + `value` (add) or v * `value` (scale)."""
    positions: int | Sequence[int] | None = None
    """None: every position, generated ones included. Integers index a row's real tokens from 0; negative ones count
    from the end of the prompt (`steer` says what that is)."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode={self.mode!r} must be one of {', '.join(get_args(Mode))}")
        if not isinstance(self.site, str):
            raise ValueError(f"site={self.site!r} must be the name of a sparse site, as '1.attn'")
        if isinstance(self.channel, bool) or not isinstance(self.channel, Integral) or self.channel < 0:
            raise ValueError(f"channel={self.channel!r} must be an index of the sparse stream, 0 or more")
        object.__setattr__(self, "channel", int(self.channel))  # numpy's integers are not of type int
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
            raise ValueError(
                f"positions={self.positions!r} cannot go with a value per token; put zeros at the other positions"
            )

    @property
    def constant(self) -> bool:
        """Whether the edit adds one number everywhere, so that it depends on no reading, position or prompt."""
        return self.mode == "add" and self.positions is None and not isinstance(self.value, Tensor)

    @property
    def counts_from_end(self) -> bool:
        """Whether a position counts from the end of the prompt."""
        return self.positions is not None and min(self.positions, default=0) < 0  # pyright: ignore

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON holds them, a tensor as nested lists."""
        value = self.value.tolist() if isinstance(self.value, Tensor) else self.value
        positions = None if self.positions is None else list(self.positions)  # pyright: ignore[reportArgumentType]
        return dict(zip(NAMES, (self.site, self.channel, value, self.mode, positions), strict=True))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Edit:
        """The inverse of `to_dict`; raises ValueError for a key that is unknown or missing."""
        if wrong := sorted(values.keys() ^ set(NAMES)):
            raise ValueError(f"an edit has the keys {', '.join(NAMES)}; {wrong[0]!r} is unknown or missing")
        value = _tensor(values["value"]) if isinstance(values["value"], list) else values["value"]
        return cls(**{**values, "value": value})


def _tensor(rows: list) -> Float[Tensor, "batch seq"]:
    """A tensor in float32 if that holds every number exactly, else in float64."""
    rectangular = all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows)
    if not rectangular or not all(isinstance(number, int | float) for row in rows for number in row):
        raise ValueError(f"value={str(rows)[:40]}... must be one number, or rows of numbers of one length")
    wide = torch.tensor(rows, dtype=torch.float64)
    return narrow if torch.equal((narrow := wide.float()).double(), wide) else wide


def as_edit_list(edits: Edit | Sequence[Edit]) -> list[Edit]:
    """The edits as a list; a single edit becomes a list of one."""
    return list(edits) if isinstance(edits, Iterable) else [edits]


def save_edits(edits: Edit | Sequence[Edit], path: str | Path) -> None:
    """Write edits as JSON, which `load_edits` reads.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     save_edits([Edit("1.attn", 7, 0.5), Edit("0.mlp", 3, 0, "scale")], f"{folder}/edits.json")
    ...     [edit.channel for edit in load_edits(f"{folder}/edits.json")]
    [7, 3]
    """
    write_json(path, {"edits": [edit.to_dict() for edit in as_edit_list(edits)]})


def load_edits(path: str | Path) -> list[Edit]:
    """Read the edits that `save_edits` wrote.

    Raises ValueError naming the file if it holds something else, OSError if there is none.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     save_edits(Edit("1.attn", 7, 0.5), f"{folder}/edits.json")
    ...     load_edits(f"{folder}/edits.json")
    [Edit(site='1.attn', channel=7, value=0.5, mode='set', positions=None)]
    """
    content = read_json(path)
    found = content.get("edits") if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(isinstance(values, dict) for values in found):
        raise ValueError(f"{path} must be JSON with a list of objects under 'edits', as save_edits writes it")
    try:
        return [Edit.from_dict(values) for values in found]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_edits(bridge_set: BridgeSet, edits: Sequence[Edit], strength: float = 1.0) -> None:
    """Raise ValueError unless the bridges can carry these edits over to a dense model."""
    if not isinstance(strength, Real) or not math.isfinite(strength):
        raise ValueError(f"strength={strength!r} must be a finite number")
    for edit in edits:
        if not isinstance(edit, Edit):
            raise ValueError(f"edits holds {edit!r}; it must be an Edit or a list of Edits")
        if edit.site not in bridge_set.sites:
            raise ValueError(f"site={edit.site!r} has no bridge; there are {', '.join(bridge_set.sites)}")
        bridge = bridge_set[edit.site]
        last = len(bridge.gain_sparse) - 1
        if edit.channel > last:
            raise ValueError(f"channel={edit.channel} must lie between 0 and {last}, the sparse stream's channels")
        if bridge.gain_sparse[edit.channel] == 0:
            raise ValueError(
                f"channel={edit.channel} at site={edit.site!r} cannot be edited: its norm gain is 0, so it "
                "never reaches the sublayer"
            )
        units = torch.stack([bridge.rms_dense, bridge.rms_sparse, bridge.gain_sparse[edit.channel].double()])
        if units.isnan().any():
            raise ValueError(
                f"site={edit.site!r}: rms and gain of its bridge are not measured (they are NaN); use bridges "
                "that fit() returned"
            )


@dataclass(frozen=True, eq=False)
class SiteEdit:
    """The edits at one bridged site, with what they need to change the dense model there."""

    bridge: Bridge
    dense_site: int
    sparse_site: int | None
    """None without a sparse model."""
    channels: list[int]
    """The sparse channels that are edited, each once."""
    edits: list[Edit]
    """In the order in which they are applied."""
    to_stream: Float[Tensor, "channels d_dense"]
    """What one read unit of each channel adds to the dense stream, strength included."""
    read_unit: Float[Tensor, " channels"]
    """gain_s / R_s, with R_s the mean RMS: what one unit of each channel of the sparse stream is in its read."""
    to_reads: dict[nn.Module, Float[Tensor, "channels d_dense"]]
    """What one read unit adds to the input of each dense module that reads the stream; empty for at="residual"."""

    @property
    def constant(self) -> bool:
        """Whether all edits add one number everywhere, so that the sum is one vector."""
        return all(edit.constant for edit in self.edits)

    @property
    def reading_mode(self) -> str | None:
        """The mode of the first edit that needs the channel's reading; None where none does."""
        return next((edit.mode for edit in self.edits if edit.mode != "add"), None)

    def constant_change(self) -> Float[Tensor, " channels"]:
        """The change of every channel in read units, where all edits are constant."""
        sums = [sum(float(e.value) for e in self.edits if e.channel == channel) for channel in self.channels]
        return self.to_stream.new_tensor(sums)

    def change(self, span: TokenSpan, reading: Float[Tensor, "b s channels"] | None) -> Float[Tensor, "b s channels"]:
        """The change of every channel in read units, at a call's tokens: its reading after all edits minus before.

        `reading` may be None where no edit needs it.
        """
        shape = (*span.real.shape, len(self.channels))
        before = self.to_stream.new_zeros(shape) if reading is None else reading.to(self.to_stream)
        after = list(before.unbind(-1))
        for edit in self.edits:
            i = self.channels.index(edit.channel)
            after[i] = _apply(edit, after[i], span)
        return torch.stack(after, -1) - before


def _apply(edit: Edit, v: Float[Tensor, "b s"], span: TokenSpan) -> Float[Tensor, "b s"]:
    if isinstance(edit.value, Tensor):
        return v + span.prompt_values(edit.value).to(v)
    edited = edit.value if edit.mode == "set" else v + edit.value if edit.mode == "add" else v * edit.value
    where = span.real if edit.positions is None else span.mask_at(edit.positions)  # pyright: ignore[reportArgumentType]
    return torch.where(where.to(v.device), edited, v)


def build_site_edit(
    dense: ResidualModel,
    sparse: ResidualModel | None,
    bridge_set: BridgeSet,
    site: str,
    edits: list[Edit],
    strength: float,
    at: EntryPoint,
) -> SiteEdit:
    """The edits of one sparse site, with what a read unit of each channel means to the dense model."""
    channels = list(dict.fromkeys(edit.channel for edit in edits))
    bridge, (dense_site, sparse_site) = bridge_set[site], bridge_set.site_pairs[bridge_set.index(site)]
    index, to_stream = dense.index(dense_site), strength * bridge.read_columns(channels)
    return SiteEdit(
        bridge,
        index,
        None if sparse is None else sparse.index(sparse_site),
        channels,
        edits,
        to_stream,
        bridge.gain_sparse[channels] / bridge.rms_sparse.to(bridge.gain_sparse),
        _to_reads(dense, index, bridge.rms_dense, to_stream) if at == "read" else {},
    )


def _to_reads(dense: ResidualModel, site: int, rms: Tensor, to_stream: Tensor) -> dict[nn.Module, Tensor]:
    modules = dense.read_modules(site)
    norms = [dense.norm(site, reader) for reader in range(len(modules))]
    if any((norm.centred, norm.present) != (norms[0].centred, norms[0].present) for norm in norms):
        raise ValueError(f"site={dense.sites[site]!r} is read through norms of two kinds; use at='residual'")
    return {module: stream_to_read(norm, rms, to_stream) for module, norm in zip(modules, norms, strict=True)}
