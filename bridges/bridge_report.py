"""BridgeReport: the held-out figures of a bridge set, each beside its controls; and the model card that shows them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from bridges.io.files import write_json
from bridges.io.tensors import read_keys


@dataclass(frozen=True)
class SiteFigures:
    """One site's held-out figures; NMSE as a fraction of the target's variance, KL in nats per token."""

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
    """The same in the other direction."""


FIGURES = tuple(f.name for f in fields(SiteFigures) if f.name != "name")


@dataclass(frozen=True)
class BridgeReport:
    """Held-out figures per site and over all of them."""

    sites: tuple[SiteFigures, ...]
    dense_ce: float
    """The dense model's own cross-entropy, nats per token."""
    sparse_ce: float
    kl_sparse_alone: float
    """KL(dense || sparse), no bridge in between."""
    tokens: int
    """Held-out tokens that the KLs were counted over."""
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def mean(self) -> dict[str, float]:
        """Each figure's mean over sites."""
        return {name: math.fsum(getattr(site, name) for site in self.sites) / len(self.sites) for name in FIGURES}

    def to_dict(self) -> dict[str, Any]:
        """The content of `report.json`."""
        return {"sites": [asdict(site) for site in self.sites], "mean": self.mean} | {
            name: getattr(self, name)
            for name in ("dense_ce", "sparse_ce", "kl_sparse_alone", "tokens", "settings", "versions")
        }

    def save(self, path: str | Path) -> None:
        """Write `report.json`."""
        write_json(path, self.to_dict())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BridgeReport:
        """The inverse of `to_dict`."""
        rest = {name: value for name, value in values.items() if name not in ("sites", "mean")}
        return cls(sites=tuple(SiteFigures(**site) for site in values["sites"]), **rest)

    @classmethod
    def load(cls, path: str | Path) -> BridgeReport:
        """Read `report.json`."""
        try:
            return cls.from_dict(read_keys(Path(path)))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a report of bridges: {error}") from None

    def flat(self, prefix: str = "eval") -> dict[str, float]:
        """Every figure under its metric name, `eval/FIGURE/SITE` and `eval/mean/FIGURE`."""
        rows = {f"{prefix}/{name}/{site.name}": getattr(site, name) for site in self.sites for name in FIGURES}
        rows |= {f"{prefix}/mean/{name}": value for name, value in self.mean.items()}
        return rows | {f"{prefix}/{name}": getattr(self, name) for name in ("dense_ce", "sparse_ce", "kl_sparse_alone")}

    def markdown(self) -> str:
        """The table as Markdown, sites in rows; controls stand in brackets behind what they control."""
        head = "| site | nmse_encode (floor) | nmse_decode (shuffled) | kl_dense_to_sparse (mean abl.) "
        head += "| kl_sparse_to_dense (mean abl.) | CE recovered, to sparse / to dense |"
        rows = [self._row(site.name, asdict(site)) for site in self.sites] + [self._row("**mean**", self.mean)]
        return "\n".join([head, "|" + "---|" * 6, *rows, "", self._caption()])

    def __str__(self) -> str:
        lines = [line for line in self.markdown().splitlines() if not line.startswith("|---")]
        cells = [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines[:-2]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        table = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in cells
        ]
        return "\n".join([*table, self._caption()])

    @staticmethod
    def _row(name: str, f: dict[str, Any]) -> str:
        cells = [
            name,
            f"{f['nmse_encode']:.3f} ({f['nmse_encode_floor']:.3f})",
            f"{f['nmse_decode']:.3f} ({f['nmse_decode_shuffled']:.2f})",
            f"{f['kl_dense_to_sparse']:.3f} ({f['kl_dense_to_sparse_mean_ablation']:.2f})",
            f"{f['kl_sparse_to_dense']:.3f} ({f['kl_sparse_to_dense_mean_ablation']:.2f})",
            f"{f['ce_recovered_dense_to_sparse']:.2f} / {f['ce_recovered_sparse_to_dense']:.2f}",
        ]
        return "| " + " | ".join(cells) + " |"

    def _caption(self) -> str:
        return (
            f"{self.tokens} held-out tokens; KL in nats per token. Cross-entropy: dense {self.dense_ce:.3f}, "
            f"sparse {self.sparse_ce:.3f}; KL of the sparse model alone {self.kl_sparse_alone:.3f}."
        )


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
