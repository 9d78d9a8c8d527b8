"""The model card of a bridge folder."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCardData

from bridges.quality import BridgeReport


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
