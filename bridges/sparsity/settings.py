"""PretrainConfig: the settings of `pretrain`, each validated and documented once."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from bridges.config import Settings
from bridges.sparsity.moving import MOVE_UNTIL


class PretrainConfig(Settings):
    """The settings of `bridges.pretrain`. Frozen; an unknown or invalid setting raises ValueError.

    Densities and learning rate are those of method, section 5.

    >>> config = PretrainConfig(steps=1000, target_density=1 / 256)
    >>> config.support, config.min_per_channel
    ('moving', 1)
    >>> PretrainConfig.from_values({"target_density": 0})
    Traceback (most recent call last):
    ValueError: target_density=0 is invalid: Input should be greater than 0
    """

    verb = "pretrain"

    steps: int = Field(default=2000, ge=1)
    """Training steps."""
    batch_size: int = Field(default=8, ge=1)
    """Rows per process and micro-batch."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-batches per step."""
    seq_len: int | None = Field(default=None, ge=2)
    """Tokens per row. None: the width of the data; 128, or a shorter context, for text and sampled rows."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the order of rows, and of dropout."""

    ce_weight: float = Field(default=1.0, ge=0)
    """Weight of the next-token loss."""
    kl_weight: float = Field(default=1.0, ge=0)
    """Weight of KL(teacher || model); counts where there is a teacher."""

    support: Literal["moving", "fixed", "projected"] = "moving"
    """How the support is found. "moving": nonzeros alone train, and every `move_every` steps the least important make
    room for the zeros of largest gradient. "fixed": zeros stay zero. "projected": every weight trains, and after each
    step all but the largest are set to zero (the paper's way)."""
    target_density: float | None = Field(default=None, gt=0, le=1)
    """Fraction of weights kept at the end of the anneal. None: as many as there are at the start."""
    start_density: float | None = Field(default=None, gt=0, le=1)
    """Fraction kept at the start; the model is projected to it. None: as many as the model has, 1 for a new one."""
    anneal: float = Field(default=0.35, ge=0, le=1)
    """Fraction of the steps over which the density falls from `start_density` to `target_density`."""
    schedule: Literal["geometric", "linear"] = "geometric"
    """How it falls: by the same factor in every step, or by the same amount (the paper's way)."""
    min_per_channel: int = Field(default=1, ge=0)
    """Nonzero weights that every neuron and attention channel keeps at least (the paper has 4)."""
    move_every: int = Field(default=25, ge=1)
    """Steps between two moves of the support; the step before a move costs a dense backward pass."""
    move_by: Literal["saliency", "magnitude"] = "saliency"
    """What the importance of a weight is. "saliency": its magnitude times the root mean square of its gradient, so that
    large weights on which nothing depends leave first. "magnitude": its magnitude."""
    move_share: float = Field(default=0.1, ge=0, le=1)
    """The part of the support that a move replaces at the start; it decays to 0 with a cosine."""
    move_until: float = Field(default=MOVE_UNTIL, gt=0, le=1)
    """The fraction of the steps after which the support stays."""

    lr: float = Field(default=2.5e-3, gt=0)
    """Peak learning rate at the final density, before warm-up, decay and the factor sqrt(target / kept)."""
    warmup: float = Field(default=0.02, ge=0, le=1)
    """Fraction of the steps over which the learning rate rises."""
    weight_decay: float = Field(default=0.02, ge=0)
    """AdamW's weight decay of matrices and embeddings."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon (the paper uses 0.1 at its scale)."""

    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast of both models' forward passes, by accelerate; weights and moments stay as they are. It counts: a
    launcher may not name another one."""
    float32_precision: Literal["highest", "high", "medium"] | None = None
    """Precision of products of dense float32 matrices in this call, as in `FitConfig`: "high" is TF32 on NVIDIA GPUs
    from Ampere on, "medium" also products by oneDNN on CPUs. None: torch's own setting, which is what is recorded."""
    cuda_graph: bool = False
    """On a GPU, run the steps between two moves of the support as one CUDA graph, for models whose kernels take less
    time than their launch. For rows without padding, models without dropout, one process."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between held-out evaluations. None: one, at the end."""
    eval_tokens: int = Field(default=16_384, ge=1)
    """Held-out tokens of an evaluation, at most, rounded up to whole rows."""
    log_every: int = Field(default=10, ge=1)
    """Steps whose mean losses make one row of the log; nothing is read back from a GPU between two rows."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between checkpoints."""
    output_dir: Path | None = None
    """The run folder. None: nothing is written."""
    resume: bool = False
    """Continue from the run folder's last checkpoint, if there is one."""
    report_to: Literal["none", "wandb"] = "none"
    """Where metrics go, in addition to `metrics.jsonl`."""
    progress: bool = True
    """Show the plan and a progress bar."""

    @model_validator(mode="after")
    def _consistent(self) -> PretrainConfig:
        if self.resume and self.output_dir is None:
            raise ValueError("resume=True needs output_dir, the run folder to continue")
        if self.support == "fixed" and (self.target_density, self.start_density) != (None, None):
            raise ValueError("support='fixed' keeps the zeros of the start; leave out target_density and start_density")
        if self.target_density and self.start_density and self.target_density > self.start_density:
            raise ValueError(
                f"target_density={self.target_density} is over start_density={self.start_density}; a run only prunes"
            )
        return self
