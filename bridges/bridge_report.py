"""BridgeReport: the held-out figures of a bridge set, each with its controls; and the model card that shows them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from huggingface_hub import ModelCardData

from bridges.io.files import write_json
from bridges.io.tensors import read_keys


@dataclass(frozen=True)
class SiteFigures:
    """One site's held-out figures; NMSE as a fraction of the target's variance, KL in nats per token.

    An NMSE is NaN where the target does not vary, a recovered cross-entropy where mean ablation does not change the
    cross-entropy.
    """

    name: str
    nmse_encode: float
    """NMSE(f(h_dense), h_sparse): 1 is what predicting the mean gives."""
    nmse_encode_floor: float
    """NMSE(AbsTopK(h_sparse), h_sparse): what a perfect encoder would still lose to its AbsTopK."""
    nmse_decode: float
    """NMSE(g(h_sparse), h_dense)."""
    kl_dense_to_sparse: float
    """KL(dense || sparse tail from f(h_dense))."""
    kl_sparse_to_dense: float
    """KL(dense || dense tail from g(h_sparse))."""
    kl_dense_to_sparse_mean_ablation: float
    """The same with the sparse model's mean residual in place of the encoder's output."""
    kl_sparse_to_dense_mean_ablation: float
    """The same with the dense model's mean residual in place of the decoder's output."""
    nmse_decode_shuffled: float
    """NMSE of the decoder when it is given another token's residual: the mean over all pairings of tokens."""
    ce_recovered_dense_to_sparse: float
    """Cross-entropy recovered between mean ablation (0) and the dense model (1)."""
    ce_recovered_sparse_to_dense: float
    """The same from the sparse model to the dense one."""
    massive_share: float = math.nan
    """Part of the tokens that the NMSEs leave out, because their norm is many times the median (method, section 3)."""
    nmse_encode_all_tokens: float = math.nan
    """nmse_encode with those tokens counted."""
    nmse_decode_all_tokens: float = math.nan
    """nmse_decode with those tokens counted."""
    kl_dense_to_sparse_se: float = math.nan
    """Standard error of kl_dense_to_sparse, over rows; NaN for a single row."""
    kl_sparse_to_dense_se: float = math.nan
    """Standard error of kl_sparse_to_dense."""


@dataclass(frozen=True)
class PathFigures:
    """A hybrid pass along one path; see `bridges.objective.hybrid.run_path`."""

    path: str
    """The first letter of each side: `"ddsd"` runs the dense model up to the second of three bridged sites, then the
    sparse model up to the third, then the dense model."""
    kl: float
    """KL(dense || pass), nats per token."""

    @property
    def changes(self) -> int:
        """How often the path changes sides."""
        return sum(one != two for one, two in pairwise(self.path))


FIGURES = tuple(f.name for f in fields(SiteFigures) if f.name != "name")
STANDARD_ERRORS = ("kl_dense_to_sparse_se", "kl_sparse_to_dense_se")
MODEL_FIGURES = ("dense_ce", "sparse_ce", "kl_sparse_alone")
"""The figures of a report that are not of a site."""
OBJECTIVES = ("objective", "objective_at_start")
"""The figures of `BridgeReport.selection`."""
COLUMNS = {
    "nmse_encode (floor)": "{nmse_encode:.3f} ({nmse_encode_floor:.3f})",
    "nmse_decode (shuffled)": "{nmse_decode:.3f} ({nmse_decode_shuffled:.2f})",
    "kl_dense_to_sparse (mean abl.)": "{kl_dense_to_sparse:.3f} ({kl_dense_to_sparse_mean_ablation:.2f})",
    "kl_sparse_to_dense (mean abl.)": "{kl_sparse_to_dense:.3f} ({kl_sparse_to_dense_mean_ablation:.2f})",
    "CE recovered, to sparse / to dense": "{ce_recovered_dense_to_sparse:.2f} / {ce_recovered_sparse_to_dense:.2f}",
}
"""The columns of a printed report; a control is in brackets behind the figure it belongs to."""
MASSIVE_COLUMN = {
    "massive tokens: NMSE with them": "{massive_share:.2%}: {nmse_encode_all_tokens:.2f} / {nmse_decode_all_tokens:.2f}"
}
"""Shown where a site leaves massive tokens out of its NMSEs."""


@dataclass(frozen=True, eq=False)
class BridgeReport:
    """Held-out figures of a bridge set, per site and over all sites; `evaluate` and `fit` make it.

    `print(report)` shows it as a table. In Python a figure that is undefined is
    NaN; `report.json` has null for it, and for an infinite KL, as JSON has no such numbers.

    >>> site = SiteFigures("0.mlp", 0.6, 0.5, 0.2, 1.5, 0.4, 3.0, 2.0, 1.9, 0.5, 0.8)
    >>> report = BridgeReport((site,), dense_ce=2.5, sparse_ce=2.75, kl_sparse_alone=0.375, tokens=128)
    >>> report.mean["nmse_decode"]
    0.2
    >>> report == BridgeReport.from_dict(report.to_dict())
    True
    """

    sites: tuple[SiteFigures, ...]
    dense_ce: float
    """The dense model's own cross-entropy, nats per token."""
    sparse_ce: float
    """The sparse model's."""
    kl_sparse_alone: float
    """KL(dense || sparse), no bridge in between."""
    tokens: int
    """Held-out tokens that the KLs are means over."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings of the fit."""
    versions: dict[str, str] = field(default_factory=dict)
    """The versions of the libraries that figures depend on."""
    nmse_tokens: int | None = None
    """Held-out tokens that the NMSEs are over, massive ones included; None in reports of earlier versions."""
    selection: dict[str, float | int] | None = None
    """The state of a fit that this is: its `step`, its `objective` on training rows that were set aside, and
    `objective_at_start`. None without gradient steps, and where the sparse model trained."""

    paths: tuple[PathFigures, ...] = ()
    """Hybrid passes that `evaluate(paths=...)` was asked for."""

    def __eq__(self, other: object) -> bool:
        """Whether all figures are equal; undefined ones, which are NaN, equal one another."""
        return isinstance(other, BridgeReport) and repr(self) == repr(other)

    @property
    def mean(self) -> dict[str, float]:
        """Each figure's mean over sites, standard errors left out; NaN if it is undefined at one of them."""
        names = (name for name in FIGURES if name not in STANDARD_ERRORS)
        return {name: math.fsum(getattr(site, name) for site in self.sites) / len(self.sites) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """The content of `report.json`, undefined figures as NaN."""
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("sites", "paths")}
        paths = {"paths": [asdict(path) for path in self.paths]} if self.paths else {}
        return {"sites": [asdict(site) for site in self.sites], "mean": self.mean} | rest | paths

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BridgeReport:
        """The inverse of `to_dict`; also reads null (None), as `report.json` has it, for a figure that is undefined."""
        rest = {name: value for name, value in values.items() if name not in ("sites", "mean")}
        sites = tuple(SiteFigures(**_null_as_nan(site, FIGURES)) for site in values["sites"])
        if rest.get("selection") is not None:
            rest["selection"] = _null_as_nan(rest["selection"], OBJECTIVES)
        rest["paths"] = tuple(PathFigures(**_null_as_nan(path, ("kl",))) for path in rest.get("paths", ()))
        return cls(sites, **_null_as_nan(rest, MODEL_FIGURES))

    def save(self, path: str | Path) -> None:
        """Write `report.json`."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> BridgeReport:
        """Read `report.json`; ValueError names a file that is damaged or holds something else."""
        try:
            return cls.from_dict(read_keys(Path(path)))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a report of bridges: {error}") from None

    def flat(self, prefix: str = "eval") -> dict[str, float]:
        """Every figure that is defined, by metric name: `eval/FIGURE/SITE`, `eval/mean/FIGURE`, `eval/FIGURE`."""
        rows = {f"{prefix}/{name}/{site.name}": getattr(site, name) for site in self.sites for name in FIGURES}
        rows |= {f"{prefix}/mean/{name}": value for name, value in self.mean.items()}
        rows |= {f"{prefix}/{name}": getattr(self, name) for name in MODEL_FIGURES}
        return {name: value for name, value in rows.items() if not math.isnan(value)}

    def markdown(self) -> str:
        """The table as Markdown, a row per site and one of means."""
        head, *rows = self._table()
        rows[-1][0] = f"**{rows[-1][0]}**"
        lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
        lines.insert(1, "|" + "---|" * len(head))
        return "\n".join([*lines, "", self._caption()])

    def __str__(self) -> str:
        rows = self._table()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]) for name, *cells in rows]
        return "\n".join([*lines, self._caption()])

    def _table(self) -> list[list[str]]:
        """The printed cells: the columns' names, a row per site, the means."""
        columns = COLUMNS | (MASSIVE_COLUMN if any(site.massive_share > 0 for site in self.sites) else {})
        rows = [(site.name, asdict(site)) for site in self.sites] + [("mean", self.mean)]
        return [["site", *columns], *([name, *(cell.format(**f) for cell in columns.values())] for name, f in rows)]

    def _caption(self) -> str:
        measured = f"{self.tokens} held-out tokens"
        if self.nmse_tokens is not None and self.nmse_tokens > self.tokens:
            measured += f" (NMSE: {self.nmse_tokens})"
        errors = [getattr(site, name) for site in self.sites for name in STANDARD_ERRORS]
        if known := [error for error in errors if not math.isnan(error)]:
            measured += f"; KL in nats per token, standard error at most {max(known):.2g}"
        else:
            measured += "; KL in nats per token"
        text = (
            f"{measured}. Cross-entropy: dense {self.dense_ce:.3f}, "
            f"sparse {self.sparse_ce:.3f}; KL of the sparse model alone {self.kl_sparse_alone:.3f}."
        )
        text = text if self.selection is None else f"{text} {self._selected()}"
        return f"{text}\n{self._paths()}" if self.paths else text

    def _paths(self) -> str:
        """The mean KL of the paths by their number of changes."""
        by_changes = {n: [path.kl for path in self.paths if path.changes == n] for n in range(len(self.sites) + 1)}
        parts = [f"{n}: {fmean(kls):.3f} ({len(kls)})" for n, kls in by_changes.items() if kls]
        return f"KL of paths by changes of side (number of paths): {', '.join(parts)}."

    def _selected(self) -> str:
        """Which step of the fit this is."""
        assert self.selection is not None
        step, best, start = (self.selection[name] for name in ("step", *OBJECTIVES))
        where = "before the first step" if step == 0 else f"after step {step}"
        return f"The state {where}: objective {best:.4g} on training rows set aside, {start:.4g} before the first step."


def _null_as_nan(values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: math.nan if value is None and name in names else value for name, value in values.items()}


def model_card(config: dict[str, Any], report: BridgeReport | None) -> str:
    """`README.md` of a bridge folder: what it joins, how to use it, its held-out figures. Same input, same text."""
    data = ModelCardData(library_name="sparse-bridges", tags=["bridges", "interpretability", "weight-sparse"])
    names = {side: config.get(side, {}).get("name", "unknown") for side in ("dense", "sparse")}
    rows = "\n".join(f"| {dense} | {sparse} |" for dense, sparse in config["pairs"])
    figures = report.markdown() if report is not None else "Not evaluated."
    return f"""---
{data.to_yaml()}
---

# Bridges between {names["dense"]} and {names["sparse"]}

Linear maps between the residual streams of a dense language model (width {config["d_dense"]}) and a weight-sparse one
(width {config["d_sparse"]}), one encoder and one decoder per pair of sites, AbsTopK with k = {config["k"]}.

```python
import bridges

bridge_set = bridges.BridgeSet.from_pretrained("this folder or its hub id")
print(bridge_set.report)
```

## Held-out figures

{figures}

## Pairs of sites

| dense | sparse |
|---|---|
{rows}
"""
