"""What `feature` returns and prints: a node's contexts, figures and weights, and what it is in the dense model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any


@dataclass(frozen=True)
class Context:
    """A token of text with what stands around it, and the node's value at each of these tokens."""

    row: int
    position: int
    value: float
    tokens: list[str]
    values: list[float]
    at: int
    """Which of the tokens it is."""
    readings: list[float] | None = None
    """What the encoder reads in the dense model at each of these tokens, in the node's units; None without one."""

    def __str__(self) -> str:
        text = "".join(f"⟦{t}⟧" if i == self.at else t for i, t in enumerate(self.tokens))
        beside = "" if self.readings is None else f" {self.readings[self.at]:+8.3f}"
        return f"{self.value:+8.3f}{beside}  {text!r}"


@dataclass(frozen=True)
class DenseSide:
    """A channel of the sparse stream in the dense model: what the encoder reads for it, what its column does there."""

    site: str
    """The sparse model's site whose bridge is used: a read's own, of a write the first bridged one after it."""
    dense_site: str
    """The dense model's site at the other end of the bridge."""
    channel: int
    encoder_correlation: float | None
    """Pearson's, over the text's tokens, of the node's value and the encoder's reading; None where one is constant."""
    both_active: float
    """The share of the text's tokens at which neither the node nor the encoder's reading is zero."""
    either_active: float
    """The share at which one of both at least is not zero."""
    added: float
    """What the figures below add to the channel at every token, in the node's units: the 99th percentile of its
    absolute value where it is not zero; 0 if it always is."""
    tokens: int
    """Tokens of the text that the figures below are means over."""
    raised: list[tuple[str, float]]
    """The dense model's tokens whose logits rise most, each with the mean change of its logit."""
    lowered: list[tuple[str, float]]
    """Those whose logits fall most."""
    kl: float
    """KL(unedited || edited) of the dense model, nats per token."""
    kl_random: float
    """The same of random directions of the same norm, mean over a few."""
    task: str | None = None
    mean_difference: float | None = None
    """The cosine of the decoder's column and the dense model's own mean difference towards the second prompt of the
    task, both as they stand in the stream (not centred), over the tokens where the prompts change the channel's read;
    None where they do not change it."""

    def __str__(self) -> str:
        correlation = "undefined" if self.encoder_correlation is None else f"{self.encoder_correlation:+.3f}"
        lines = [
            f"dense model at {self.dense_site}, by channel {self.channel} of the bridge of {self.site}: the encoder's "
            f"reading has correlation {correlation} with the node; both are active at {self.both_active:.2%} of "
            f"tokens, one or both at {self.either_active:.2%}",
            f"{self.added:+.3f} of it added to the dense stream everywhere ({self.tokens} tokens): KL {self.kl:.4f} "
            f"nats per token, random directions of that norm {self.kl_random:.4f}",
        ]
        for title, changes in (("raised", self.raised), ("lowered", self.lowered)):
            listed = ", ".join(f"{token!r} {change:+.3f}" for token, change in changes)
            lines.append(f"logits {title}: {listed or 'none'}")
        if self.task is not None:
            cosine = "undefined: the prompts do not change the channel"
            cosine = cosine if self.mean_difference is None else f"{self.mean_difference:+.3f}"
            lines.append(f"cosine of its column and the dense model's mean difference of {self.task}: {cosine}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Feature:
    """What a node does on text."""

    node: str
    tokens: int
    """Tokens of the text."""
    density: float
    """The share of tokens at which the node is not zero."""
    mean: float
    percentiles: dict[str, float]
    """Of its values where it is not zero; empty where it never is."""
    positive: list[Context]
    """The tokens of largest value, no two in one row if there are enough; only values over 0."""
    negative: list[Context]
    """The tokens of smallest value, only values under 0: both signs mean something."""
    random: list[Context]
    """Tokens at which it is not zero, drawn evenly."""
    weights_in: list[tuple[str, float]]
    """The nodes it reads from, and tokens that write to its stream channel, with their weights, largest first."""
    weights_out: list[tuple[str, float]]
    """The nodes that read it, and tokens whose logits it moves."""
    dense: DenseSide | None = None
    """What it is in the dense model; None if none was given, or if the node is a channel of no bridged stream."""
    no_dense_side: str = ""
    """Why a dense model that was given has no part in it; else empty."""
    task: str | None = None
    prompts: list[Context] = field(default_factory=list)
    """Both prompts of the task's first pairs, one after the other, each at the token where the node is largest."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Feature:
        """The inverse of `to_dict`; entries that are no fields are left out."""
        own = {one.name: values[one.name] for one in fields(cls) if one.name in values}
        for kind in ("positive", "negative", "random", "prompts"):
            own[kind] = [Context(**context) for context in own.get(kind, ())]
        for side in ("weights_in", "weights_out"):
            own[side] = [(name, weight) for name, weight in own[side]]
        if own["dense"] is not None:
            changes = {name: [tuple(one) for one in own["dense"][name]] for name in ("raised", "lowered")}
            own["dense"] = DenseSide(**{**own["dense"], **changes})
        return cls(**own)

    def first(self, n: int) -> Feature:
        """The same with at most `n` contexts of each kind and `n` weights of each side."""
        shortened = ("positive", "negative", "random", "weights_in", "weights_out")
        return replace(self, **{name: getattr(self, name)[:n] for name in shortened})

    def __str__(self) -> str:
        lines = [f"{self.node}: active at {self.density:.2%} of {self.tokens} tokens, mean {self.mean:.3f}"]
        if self.percentiles:
            lines.append("where active: " + ", ".join(f"{k} % {v:.3f}" for k, v in self.percentiles.items()))
        if self.dense is not None:
            lines.append("contexts: the node's value, and the encoder's reading of the dense model")
        for title, contexts in (
            ("most positive", self.positive),
            ("most negative", self.negative),
            ("random", self.random),
        ):
            lines += [f"{title}:", *(f"  {context}" for context in contexts)] if contexts else [f"{title}: none"]
        if self.prompts:
            lines += [f"on prompts of {self.task}, both of a pair:", *(f"  {context}" for context in self.prompts)]
        for title, weights in (("weights in", self.weights_in), ("weights out", self.weights_out)):
            lines.append(f"{title}: " + (", ".join(f"{name} {weight:+.3f}" for name, weight in weights) or "none"))
        if self.dense is not None:
            lines.append(str(self.dense))
        elif self.no_dense_side:
            lines.append(f"no dense side: {self.no_dense_side}")
        return "\n".join(lines)
