"""PruneConfig: the settings of `prune`, each validated and documented once."""

from __future__ import annotations

from pydantic import Field

from bridges.config import Settings


class PruneConfig(Settings):
    """The settings of `bridges.prune` (paper A.5; method, section 6). Frozen; an invalid setting raises ValueError.

    >>> PruneConfig(steps=100).target_loss
    0.15
    """

    verb = "prune"

    target_loss: float = Field(default=0.15, gt=0)
    """Nats; the circuit is the smallest found whose loss on pairs of its own is at most this."""
    n: int = Field(default=256, ge=4)
    """Pairs of prompts: three quarters train masks, one quarter chooses the size."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the prompts, of their order and of the masks' first values."""
    seeds: int = Field(default=1, ge=1)
    """Searches, each with masks of its own; the smallest circuit is returned."""
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
