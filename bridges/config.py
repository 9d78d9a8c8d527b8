"""FitConfig: every setting of `fit`, frozen, validated and documented in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bridges.io.files import read_toml, write_text

DEFAULT_SEQ_LEN = 128
"""Tokens per row where the library cuts text or samples rows and neither the caller nor a context says otherwise."""


class FitConfig(BaseModel):
    """The settings of `bridges.fit`; ValueError names an unknown or impossible one."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    steps: int = Field(default=300, ge=0)
    """Gradient steps after the closed form; 0 is the closed form alone."""
    batch_size: int = Field(default=8, ge=1)
    """Rows per process and micro-batch."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-batches per step."""
    seq_len: int | None = Field(default=None, ge=2)
    """Tokens per row; None: the data's own width, or the least of 128 and both contexts where text is cut here."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of the bridges at the first step; it decays linearly to zero."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seeds the order of rows, the sampled sites and the sampled sequences."""

    k: int | None = Field(default=None, ge=1)
    """Entries that AbsTopK keeps; None: the sparse model's own at its attention input, else a quarter of its width."""
    closed_form: bool = True
    """Start from the least-squares solution; False starts from random maps."""
    closed_form_tokens: int = Field(default=200_000, ge=1)
    """Tokens whose moments the closed form is solved from."""
    ridge: float = Field(default=1e-4, ge=0)
    """alpha of the closed form: the penalty is alpha times the mean variance per input channel."""
    moments_gib: float = Field(default=4.0, gt=0)
    """Memory for moments; more sites than fit are done in groups, one pass over the tokens each."""

    sites: tuple[str, ...] | None = None
    """Bridge these sparse sites only."""
    site_map: tuple[tuple[str, str], ...] | None = None
    """Pairs (dense site, sparse site) in place of the default pairing."""
    sites_per_step: int | Literal["all"] = 2
    """Sites whose hybrid passes are run in a step, sampled evenly; the reconstruction losses run at every site."""

    nmse_weight: float = Field(default=1.0, ge=0)
    """w_n of the objective, for both reconstruction losses."""
    kl_dense_to_sparse_weight: float = Field(default=1.0, ge=0)
    """w_ds: the sparse tail from the encoder's output."""
    kl_sparse_to_dense_weight: float = Field(default=1.0, ge=0)
    """w_sd: the dense tail from the decoder's output."""
    ce_weight: float = Field(default=1.0, ge=0)
    """w_ce: the sparse model's own next-token loss, where it trains."""
    interchange_weight: float = Field(default=0.0, ge=0)
    """w_i of the interchange loss, which makes single channels carry what changes when a token does, for steering. In
    the closed form its ratio to `nmse_weight` counts."""
    interchange_pairs: int = Field(default=512, ge=1)
    """Pairs of rows that the interchange loss is made from."""

    train_sparse: bool = False
    """Train the weight-sparse model together with the bridges."""
    target_density: float | None = Field(default=None, gt=0, le=1)
    """Fraction of weights kept at the end of the anneal; None keeps the present zeros."""
    start_density: float = Field(default=1.0, gt=0, le=1)
    """Fraction of weights that the anneal starts from: 1 from scratch, less in a leg that carries on from another."""
    anneal: float = Field(default=0.5, ge=0, le=1)
    """Part of the training over which the kept fraction falls linearly from `start_density`."""
    sparse_lr: float = Field(default=3e-3, gt=0)
    """Learning rate of the sparse model, before warm-up, decay and the factor sqrt(target / kept)."""
    sparse_weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's weight decay for the sparse model."""
    sparse_eps: float = Field(default=1e-6, gt=0)
    """AdamW's epsilon for the sparse model (the paper uses 0.1 at its scale)."""

    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast of both models' passes, by accelerate."""
    eval_every: int | None = Field(default=None, ge=1)
    """Held-out evaluation every so many steps; None: at the end alone."""
    eval_tokens: int = Field(default=16_384, ge=1)
    """At most so many held-out tokens per evaluation."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Steps between checkpoints."""
    sampled_rows: int = Field(default=1024, ge=2)
    """With `data=None`, sequences sampled from the dense model."""
    output_dir: Path | None = None
    """The run folder; None: nothing is written."""
    resume: bool = False
    """Continue from the run folder's last checkpoint, if there is one."""
    report_to: Literal["none", "wandb"] = "none"
    """Where metrics go beside `metrics.jsonl`."""
    progress: bool = True
    """Show the plan and a progress bar."""

    @model_validator(mode="after")
    def _consistent(self) -> FitConfig:
        if isinstance(self.sites_per_step, int) and self.sites_per_step < 1:
            raise ValueError(f"sites_per_step={self.sites_per_step} must be at least 1, or 'all'")
        if self.target_density is not None and not self.train_sparse:
            raise ValueError(f"target_density={self.target_density} needs train_sparse=True")
        if self.interchange_weight > 0:
            self._can_interchange()
        if self.resume and self.output_dir is None:
            raise ValueError("resume=True needs output_dir, the run folder to continue")
        return self

    def _can_interchange(self) -> None:
        """Channels are chosen pair by pair once, by decoders from a closed form, of a sparse model that stays."""
        name = f"interchange_weight={self.interchange_weight}"
        if not self.closed_form or self.nmse_weight == 0:
            raise ValueError(f"{name} is solved in the closed form; it needs closed_form=True and nmse_weight over 0")
        if self.train_sparse:
            raise ValueError(f"{name} needs a frozen sparse model; train it first, then fit with train_sparse=False")

    def recorded(self) -> dict[str, Any]:
        """The settings that decide what a fit computes, as plain values: where and how it is shown is left out."""
        return self.model_dump(mode="json", exclude={"output_dir", "resume", "report_to", "progress"})

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> FitConfig:
        """Build from plain values; ValueError with one line that names the setting, its value and the remedy."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise ValueError(_one_line(error, list(cls.model_fields))) from None

    @classmethod
    def from_file(cls, path: str | Path) -> FitConfig:
        """Read TOML: the table `[fit]`, or the top level where there is none."""
        values = read_toml(path)
        table = values.get("fit", values)
        if not isinstance(table, dict):
            raise ValueError(f"{path} has fit={table!r}; [fit] must be a table")
        return cls.from_values(table)

    def to_file(self, path: str | Path) -> None:
        """Write TOML with the table `[fit]`; settings that are None are left out."""
        write_text(path, tomli_w.dumps({"fit": self.model_dump(mode="json", exclude_none=True)}))

    def with_settings(self, settings: dict[str, Any]) -> FitConfig:
        """The same with some settings replaced, validated anew."""
        return self.from_values({**self.model_dump(), **settings})


def _one_line(error: ValidationError, known: list[str]) -> str:
    first = error.errors()[0]
    # The setting and places in it; pydantic also names the member of a union that it tried.
    name = ".".join(str(part) for i, part in enumerate(first["loc"]) if i == 0 or isinstance(part, int))
    if first["type"] == "extra_forbidden":
        return f"{name}={first['input']!r} is no setting of fit; those are {', '.join(known)}"
    if not name:
        return str(first["msg"]).removeprefix("Value error, ")
    return f"{name}={first['input']!r} cannot be: {first['msg']}"
