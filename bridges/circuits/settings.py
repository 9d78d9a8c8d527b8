"""PruneConfig: the settings of `prune`, each validated and documented once."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from bridges.config import Settings


class PruneConfig(Settings):
    """The settings of `bridges.prune` (paper A.5; method, section 6). Frozen; an invalid setting raises ValueError.

    >>> PruneConfig(steps=100).target_loss
    0.15
    """

    verb = "prune"

    target_loss: float = Field(default=0.15, gt=0)
    """Nats; the circuit is the smallest found whose loss on pairs of its own is at most this."""
    method: Literal["masks", "attribution"] = "masks"
    """How nodes are ranked before the size is bisected. "masks": by masks that learn, at the cost of `steps` training
    steps. "attribution": by the size of the gradient of the loss times the difference from the mean, at the cost of one
    pass over the training pairs; settings of the masks do nothing then, and every seed gives the same."""
    n: int = Field(default=256, ge=4)
    """Pairs of prompts: three quarters train masks, one quarter chooses the size."""
    judge_share: float = Field(default=0.25, ge=0, lt=1)
    """The part of the pairs that is set aside to choose the size. 0: the pairs that train masks choose it, too, so a
    circuit may know their answers by heart, as the control of shuffled labels allows it."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the prompts, of their order and of the masks' first values."""
    seeds: int = Field(default=1, ge=1)
    """Searches, each with masks of its own; the smallest circuit is returned."""
    rounds: int = Field(default=1, ge=1)
    """Searches one after the other, each without the nodes found before, as long as the model does the task without
    these: the circuit is their union. 1: the first alone, which the model may do without."""
    steps: int = Field(default=200, ge=1)
    """Training steps of the masks."""
    pairs_per_step: int = Field(default=32, ge=1)
    """Pairs of a step, both prompts of each."""
    lr: float = Field(default=0.02, gt=0)
    """AdamW's learning rate of the masks, decaying linearly to zero."""
    weight_decay: float = Field(default=1e-3, ge=0)
    """AdamW's weight decay of the masks (the paper's)."""
    price: float = Field(default=1e-3, gt=0)
    """Loss per node that is on, at the start."""
    price_step: float = Field(default=0.03, ge=0)
    """How much the price rises in a step whose loss is under the target, and falls in any other."""
    text_tokens: int = Field(default=16_384, ge=1)
    """Tokens of text that the nodes' means are taken over, at most."""

    @model_validator(mode="after")
    def _consistent(self) -> PruneConfig:
        if self.method == "attribution" and self.seeds > 1:
            raise ValueError(
                f"seeds={self.seeds} with method='attribution' would repeat one search, which draws nothing; leave out "
                "seeds, or set method='masks'"
            )
        return self
