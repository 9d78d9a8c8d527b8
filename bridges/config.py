"""Settings: what all have in common, and FitConfig, those of `fit`; each is validated and documented once."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bridges.io.files import read_toml, write_text

DEFAULT_SEQ_LEN = 128
"""Tokens per row of text that is cut or sampled where no other width is given; a shorter context limits it."""


T = TypeVar("T")
Auto = T | Literal["auto"]
S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """Settings of one verb. Frozen; an unknown or invalid setting raises ValueError, in one line."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    verb: ClassVar[str]
    """Whose settings they are; also the name of their table in a TOML file."""
    UNRECORDED: ClassVar[frozenset[str]] = frozenset({"output_dir", "resume", "report_to", "progress"})
    """Settings that no result depends on."""

    if not TYPE_CHECKING:  # so that editors still see the fields as the arguments

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ValueError(_one_line(error, self.verb, list(type(self).model_fields))) from None

    def recorded(self) -> dict[str, Any]:
        """Plain values of the settings that a result depends on: all but folder, `resume`, `report_to`, `progress`."""
        return self.model_dump(mode="json", exclude=set(self.UNRECORDED))

    @classmethod
    def from_values(cls: type[S], values: dict[str, Any]) -> S:
        """Build from plain values; raises ValueError with one line that names the setting, its value and the remedy."""
        return cls(**values)

    @classmethod
    def from_file(cls: type[S], path: str | Path) -> S:
        """Read a TOML file: the table named as the verb (`[fit]`), or the top level where there is none."""
        values = read_toml(path)
        table = values.get(cls.verb, values)
        if not isinstance(table, dict):
            raise ValueError(f"{path} has {cls.verb}={table!r}; [{cls.verb}] must be a table")
        return cls.from_values(table)

    def to_file(self, path: str | Path) -> None:
        """Write a TOML file with the table named as the verb; settings that are None are left out."""
        write_text(path, tomli_w.dumps({self.verb: self.model_dump(mode="json", exclude_none=True)}))

    def with_settings(self: S, settings: dict[str, Any]) -> S:
        """A copy with some settings replaced; raises ValueError as `from_values` does."""
        return self.from_values({**self.model_dump(), **settings})


class FitConfig(Settings):
    """The settings of `bridges.fit`. Frozen; an unknown or invalid setting raises ValueError.

    Weights and terms are those of the objective in method, section 2; the closed form is that of section 3.

    >>> config = FitConfig(steps=100, sites=("0.attn", "0.mlp"))
    >>> config.lr, config.with_settings({"lr": 0.01}).lr
    (0.001, 0.01)
    >>> FitConfig.from_values({"steps": -1})
    Traceback (most recent call last):
    ValueError: steps=-1 is invalid: Input should be greater than or equal to 0
    """

    verb = "fit"

    steps: int = Field(default=300, ge=0)
    """Gradient steps after the closed form; 0 is the closed form alone."""
    batch_size: int = Field(default=8, ge=1)
    """Rows per process and micro-batch."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-batches per step."""
    seq_len: int | None = Field(default=None, ge=2)
    """Tokens per row. None: the width of the data; 128, or a shorter context, for text and sampled rows."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of the bridges at the first step; it decays linearly to zero."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the order of rows, of the sampled sites and of the sampled sequences."""

    k: int | None = Field(default=None, ge=1)
    """Entries that AbsTopK keeps. None: as many as the sparse model keeps at its attention input, else d_sparse / 4."""
    closed_form: bool = True
    """Start from the least-squares solution; False: from random maps."""
    closed_form_tokens: Auto[Annotated[int, Field(ge=1)]] = "auto"
    """Tokens that the closed form is solved from. "auto": 48 per channel of the wider model, at most 200,000."""
    ridge: Auto[Annotated[float, Field(ge=0)]] = "auto"
    """Ridge penalty of the closed form, on inputs of variance 1. "auto": chosen for each site and direction by the
    error on training rows that are set aside."""
    decoder_attribution: Literal["equal", "effect"] = "equal"
    """To which of several sparse channels that vary together the closed form's decoder attributes what they all
    predict. "equal": to all alike. "effect": more to those on which the sparse model's own prediction depends, so that
    one such channel, edited alone, does more to the dense model; needs a backward pass through the sparse model."""
    massive_threshold: Annotated[float, Field(gt=1)] | Literal["off"] = 20.0
    """A token whose centred norm at a site is over this many times the median there counts in no mean, scale or NMSE
    of that site, and in the closed form only where the other tokens' NMSE hardly suffers. "off": every token counts."""
    moments_gib: float = Field(default=4.0, gt=0)
    """Memory for the moments of the closed form, GiB. Sites that exceed it are solved in groups, one pass each."""

    sites: tuple[str, ...] | None = None
    """Bridge these sparse sites only."""
    site_map: tuple[tuple[str, str], ...] | None = None
    """Pairs (dense site, sparse site) that replace the default pairing."""
    sites_per_step: int | Literal["all"] = 2
    """Sites whose KLs are computed in a step, drawn uniformly; the reconstruction losses are computed at every site."""

    nmse_weight: float = Field(default=1.0, ge=0)
    """w_n: weight of both reconstruction losses."""
    kl_dense_to_sparse_weight: float = Field(default=1.0, ge=0)
    """w_ds: weight of the KL of the sparse tail that runs on the encoder's output."""
    kl_sparse_to_dense_weight: float = Field(default=1.0, ge=0)
    """w_sd: weight of the KL of the dense tail that runs on the decoder's output."""
    ce_weight: float = Field(default=1.0, ge=0)
    """w_ce: weight of the sparse model's next-token loss; counts where that model trains."""

    path_weight: float = Field(default=0.0, ge=0)
    """Weight of the KL of hybrid passes that change sides several times: one pass in every step, its number of changes
    (two or more), its bridges and its first side drawn anew. It costs about what one more of `sites_per_step` does. The
    best state is chosen without it, by the passes that change sides once."""

    train_sparse: bool = False
    """Train the sparse model together with the bridges."""
    target_density: float | None = Field(default=None, gt=0, le=1)
    """Fraction of weights kept at the end of the anneal. None: zeros stay zero and the other weights train."""
    start_density: float = Field(default=1.0, gt=0, le=1)
    """Fraction of weights kept at the start of the anneal; below 1 where an earlier run has pruned the model."""
    anneal: float = Field(default=0.5, ge=0, le=1)
    """Fraction of the steps over which the kept fraction falls linearly from `start_density` to `target_density`."""
    support: Literal["projected", "moving"] = "projected"
    """How a sparse model with a `target_density` trains. "projected": every weight, and after each step all but the
    largest are set to zero (the paper's way). "moving": its nonzeros alone, at less cost; every `move_every` steps the
    least important of them are replaced by the zeros of largest gradient, as in `pretrain`."""
    move_every: int = Field(default=25, ge=1)
    """Steps between two moves of a moving support; a step that ends in a move costs a dense backward pass."""
    move_share: float = Field(default=0.1, ge=0, le=1)
    """The part of a moving support that a move replaces at the start; it decays with a cosine to 0 at 85 % of the
    steps, after which the support stays."""
    sparse_lr: float = Field(default=3e-3, gt=0)
    """Peak learning rate of the sparse model, before warm-up, decay and the factor sqrt(target / kept)."""
    sparse_weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's weight decay for the sparse model."""
    sparse_eps: float = Field(default=1e-6, gt=0)
    """AdamW's epsilon for the sparse model (the paper uses 0.1 at its scale)."""

    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast of both models' forward passes, by accelerate. It counts: a launcher may not name another one."""
    float32_precision: Literal["highest", "high", "medium"] | None = None
    """Precision of products of dense float32 matrices, by `torch.set_float32_matmul_precision`, in this call alone.
    "highest": float32. "high": TF32 on NVIDIA GPUs from Ampere on, which is faster and rounds factors to 11 bits, by up
    to 5e-4. "medium": the same there; on CPUs products by oneDNN, which may round factors to bfloat16, by up to 4e-3,
    where the processor has matrix units for it, and gives float32 elsewhere. The moments of the closed form are in
    float64 in any case. None: torch's own setting, which is what is recorded."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between held-out evaluations. None: one, at the end."""
    eval_tokens: Auto[Annotated[int, Field(ge=1)]] = "auto"
    """Held-out tokens of an evaluation, at most, rounded up to whole rows. "auto": 16,384 for the NMSEs, and as many of
    them for the KLs as a budget of computation allows; the report gives the KLs' standard error."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Steps between checkpoints."""
    sampled_rows: Auto[Annotated[int, Field(ge=2)]] = "auto"
    """Sequences sampled from the dense model where `data` is None. "auto": as many as the closed form and the steps
    need, at most 1,024 for the steps."""
    output_dir: Path | None = None
    """The run folder. None: nothing is written."""
    resume: bool = False
    """Continue from the run folder's last checkpoint, if there is one."""
    report_to: Literal["none", "wandb"] = "none"
    """Where metrics go, in addition to `metrics.jsonl`."""
    progress: bool = True
    """Show the plan and a progress bar."""

    @model_validator(mode="after")
    def _consistent(self) -> FitConfig:
        if isinstance(self.sites_per_step, int) and self.sites_per_step < 1:
            raise ValueError(f"sites_per_step={self.sites_per_step} must be at least 1, or 'all'")
        if self.target_density is not None and not self.train_sparse:
            raise ValueError(f"target_density={self.target_density} needs train_sparse=True")
        if self.support == "moving" and self.target_density is None:
            raise ValueError("support='moving' needs target_density; without it the zeros of the start stay zero")
        falls = self.target_density is not None and self.target_density < self.start_density
        if self.support == "moving" and falls and self.steps and self.move_every > max(1, self.anneal * self.steps):
            raise ValueError(
                f"move_every={self.move_every} is over anneal * steps = {self.anneal * self.steps:g}, the steps in "
                "which the density falls: it would fall at once; pass fewer"
            )
        if self.resume and self.output_dir is None:
            raise ValueError("resume=True needs output_dir, the run folder to continue")
        return self

    def step_rows(self, world_size: int = 1) -> int:
        """Rows that all steps take together, each counted as often as it is taken."""
        return self.steps * self.batch_size * self.gradient_accumulation_steps * world_size

    def closed_form_tokens_for(self, width: int) -> int:
        """`closed_form_tokens`, for a wider model of this width."""
        return min(200_000, 48 * width) if self.closed_form_tokens == "auto" else self.closed_form_tokens

    @property
    def moments_bytes(self) -> float:
        """`moments_gib` in bytes."""
        return self.moments_gib * 2**30

    @property
    def heldout_tokens(self) -> int:
        """Held-out tokens that the NMSEs are measured on, at most."""
        return 16_384 if self.eval_tokens == "auto" else self.eval_tokens


def _one_line(error: ValidationError, verb: str, known: list[str]) -> str:
    first = error.errors()[0]
    # The setting and indices in it; pydantic also names the member of a union that it tried.
    name = ".".join(str(part) for i, part in enumerate(first["loc"]) if i == 0 or isinstance(part, int))
    if first["type"] == "extra_forbidden":
        meant = get_close_matches(name, known, 1, cutoff=0.75)
        remedy = f"did you mean {meant[0]}? The" if meant else "the"
        return f"{name}={first['input']!r} is not a setting of {verb}; {remedy} settings are {', '.join(known)}"
    if not name:
        return str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "tuple_type" and isinstance(first["input"], str):
        return f"{name}={first['input']!r} is invalid: it must be a sequence, as {name}=({first['input']!r},)"
    of_setting = (other for other in error.errors() if other["loc"][:1] == first["loc"][:1])
    words = "".join(
        f", or {other.get('ctx', {})['expected']}" for other in of_setting if other["type"] == "literal_error"
    )
    return f"{name}={first['input']!r} is invalid: {first['msg']}{words if first['type'] != 'literal_error' else ''}"
