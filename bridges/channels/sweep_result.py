"""Sweep: the figures of an edit and its baselines, as a record that prints, saves and draws itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridges.channels.agreement import Agreement
from bridges.channels.curves import Curve
from bridges.channels.prompts import Channels
from bridges.channels.side_effects import SideEffects
from bridges.io.files import write_json
from bridges.report.curves import BASELINES, CURVES
from bridges.report.plots import steering_plot


@dataclass(frozen=True)
class Sweep:
    """An edit's curve, its baselines and its side effects, on prompts that the channels were not chosen on.

    `sweep` returns it; `print` shows all figures, `save` and `plot` write them.

    >>> curves = {name: Curve(mean=[0.01, 0.8], low=[0.0, 0.7], high=[0.02, 0.9]) for name in CURVES}
    >>> agreement = Agreement(slope=1.1, r_squared=0.9, sign=0.95, r_squared_shuffled=None)
    >>> effects = SideEffects(0.02, 0.01, 0.3, 0.5, 0.001, tokens=4096)
    >>> channels = Channels("1.attn", (7, 120), at="residual")
    >>> result = Sweep(
    ...     "for_while", channels, [0.0, 1.0], curves, [0.7, 0.9], 200, 1.0, 0.98, "1.mlp", agreement, effects
    ... )
    >>> print(*str(result).splitlines()[:2], sep="\\n")
    for_while: P(target), strength 0 to 1, 200 held-out prompts (solved: dense 100%, sparse 98%)
      channels [7, 120] at 1.attn (residual)                         0.010 -> 0.800 [0.700, 0.900]
    """

    task: str
    chosen: Channels
    strengths: list[float]
    curves: dict[str, Curve]
    """By the names in `bridges.report.curves.CURVES`: `p_target`, the edit, and `p_target_...`, the baselines."""
    p_target_by_direction: list[float]
    """At strength 1, by task order: where the original prompt is the task's first, and where it is the second."""
    prompts: int
    accuracy_dense: float
    """Part of the prompts whose answer the unedited dense model finds likelier than the target."""
    accuracy_sparse: float
    mean_difference_site: str
    """The dense site at which the model's own mean difference does most."""
    agreement: Agreement
    effects: SideEffects
    ranking_agreement: float | None = None
    """Rank correlation of predicted and measured effects if the channels were searched for."""
    in_circuit: tuple[bool, ...] | None = None
    """For each channel whether it is a node of the circuit, if they were searched for with one."""

    def to_dict(self) -> dict[str, Any]:
        """The content of `steering.json`."""
        channels = self.chosen.channels
        return {
            "task": self.task,
            "site": self.chosen.site,
            "channel": channels[0] if len(channels) == 1 else list(channels),
            "at": self.chosen.at,
            "strengths": self.strengths,
            **{name: curve.mean for name, curve in self.curves.items()},
            "bands": {name: {"low": curve.low, "high": curve.high} for name, curve in self.curves.items()},
            "p_target_by_direction": self.p_target_by_direction,
            "prompts": self.prompts,
            "accuracy_dense": self.accuracy_dense,
            "accuracy_sparse": self.accuracy_sparse,
            "mean_difference_site": self.mean_difference_site,
            "agreement": self.agreement._asdict(),
            "side_effects": self.effects._asdict(),
            "ranking_agreement": self.ranking_agreement,
            **({} if self.in_circuit is None else {"in_circuit": list(self.in_circuit)}),
        }

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON."""
        write_json(path, self.to_dict())

    def plot(self, path: str | Path) -> Path:
        """Draw the curves with their bands, log scale, as a PNG (paper, figure 9); returns its path."""
        return steering_plot(self.to_dict(), path)

    def __str__(self) -> str:
        channels = list(self.chosen.channels)
        what = f"channel {channels[0]}" if len(channels) == 1 else f"channels {channels}"
        first, second = self.p_target_by_direction
        lines = [
            f"{self.task}: P(target), strength {self.strengths[0]:g} to {self.strengths[-1]:g}, {self.prompts} "
            f"held-out prompts (solved: dense {self.accuracy_dense:.0%}, sparse {self.accuracy_sparse:.0%})",
            self._line("p_target", f"{what} at {self.chosen.site} ({self.chosen.at})"),
            *(self._line(name, CURVES[name].label) for name in BASELINES),
            f"  at strength 1, by task order: {first:.3f} and {second:.3f}",
            *self._of_circuit(),
            f"  {self.agreement}",
            f"  {self.effects}",
        ]
        return "\n".join(lines)

    def _of_circuit(self) -> list[str]:
        if self.in_circuit is None:
            return []
        return [f"  nodes of the circuit: {sum(self.in_circuit)} of {len(self.in_circuit)} channels"]

    def _line(self, name: str, label: str) -> str:
        """One curve: its mean at the first and the last strength, and the interval at the last."""
        curve = self.curves[name]
        band = f"[{curve.low[-1]:.3f}, {curve.high[-1]:.3f}]"
        return f"  {label:<62} {curve.mean[0]:.3f} -> {curve.mean[-1]:.3f} {band}"
