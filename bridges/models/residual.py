"""`ResidualModel`: a language model as a chain of sublayers on one residual stream (method.md, section 1).

Read: a sublayer's input, after the norm.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridges.models.attention_mask import zero_one_mask
from bridges.models.modes import replaced_forwards, uncompiled
from bridges.models.prefix import PrefixCache

HookFunction = Callable[[Tensor], Tensor | None]
"""Called with a stream or a read [batch, seq, d_model]; replaces it by what it returns, unless that is None."""


class Site(str):
    """A point on the residual stream: the input of a sublayer, `3.attn`, `3.mlp` or `3.block`, or of the head, `final`.

    A string: it compares and hashes as its name.
    """

    __slots__ = ()

    @property
    def kind(self) -> str:
        """`attn`, `mlp`, `block` or `final`."""
        return self.rpartition(".")[2]

    @property
    def layer(self) -> int | None:
        """The index of the site's layer, None for `final`."""
        layer = self.partition(".")[0]
        return int(layer) if layer.isdigit() else None


class Norm(NamedTuple):
    """The normalisation between a site and its sublayer's read (method.md, section 4)."""

    gain: Float[Tensor, " d_model"]
    """The factor of each channel after the division by the RMS, in float32 or wider."""
    centred: bool
    """True for a LayerNorm, which subtracts the mean over channels."""
    present: bool = True
    """False where the read is the stream itself: gain 1, not centred, and R, the mean RMS, is taken as 1."""


@dataclass(frozen=True)
class Context:
    """The inputs of a sublayer other than the stream: one batch's tokens and mask, and what the model makes of them."""

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch total"] | None
    """Of the tokens of a prefix too, where the pass comes after one."""
    embedding: Float[Tensor, "batch seq d_model"]
    """The residual at the first site."""
    extra: Any = None
    """The model's own inputs to its layers (position embeddings, attention masks)."""


class Trace(NamedTuple):
    """The results of one forward pass that hybrid passes start from."""

    residuals: list[Float[Tensor, "batch seq d_model"]]
    """The stream at every site, in order."""
    logits: Float[Tensor, "batch seq vocab"]
    context: Context


class ResidualModel(ABC):
    """A decoder-only model as sublayers M_0 .. M_{n-1} and a head: h_{i+1} = M_i(h_i), logits = head(h_n).

    Site i is the input of sublayer i; the last site, `final`, is the input of the head (final norm and unembedding).
    Built by `bridges.as_residual`. A subclass supplies the abstract methods; the others are built on them. Errors:
    ValueError for a site that the model does not have, and for rows longer than its context.

    >>> import bridges
    >>> residual_model = bridges.as_residual(bridges.load_pair().sparse)
    >>> input_ids = torch.tensor([[5, 17, 4]])
    >>> residuals, logits = residual_model.residuals(input_ids)  # per site [batch, seq, d_model], [batch, seq, vocab]
    >>> len(residuals) == len(residual_model.sites), logits.shape
    (True, torch.Size([1, 3, 1024]))
    >>> torch.equal(residual_model.run_from("1.mlp", residuals[3], input_ids), logits)
    True
    >>> residual_model.run_from("1.mlp", torch.zeros_like(residuals[3]), input_ids).shape
    torch.Size([1, 3, 1024])
    >>> [read.shape[-1] for read in residual_model.reads(input_ids)] == [residual_model.d_model] * 5
    True
    """

    model: nn.Module
    sites: list[Site]
    d_model: int
    vocab_size: int
    """Tokens that have both an embedding and a logit."""
    context_length: int | None
    """The largest number of tokens in a row, None where the model sets no limit."""

    @abstractmethod
    def context(
        self,
        input_ids: Int[Tensor, "b s"],
        attention_mask: Int[Tensor, "b total"] | None = None,
        prefix: PrefixCache | None = None,
    ) -> Context:
        """Embed the tokens and prepare what sublayers share (masks, position embeddings); runs no sublayer.

        `prefix`: of the tokens before these, from `run_prefix`; the mask covers both.
        """

    @abstractmethod
    def sublayer(self, index: int, residual: Float[Tensor, "b s d"], context: Context) -> Float[Tensor, "b s d"]:
        """M_index: from the stream at site `index` to the stream at the next one."""

    @abstractmethod
    def head(self, residual: Float[Tensor, "b s d"], context: Context) -> Float[Tensor, "b s vocab"]:
        """Logits from the stream at `final`."""

    @abstractmethod
    def read_modules(self, index: int) -> list[nn.Module]:
        """The modules whose first input is a read of site `index`, on its leading d_model channels.

        One module, or two for a block whose attention and MLP both read its stream; `reads` gives the first one's.
        """

    @abstractmethod
    def norm(self, index: int, reader: int = 0) -> Norm:
        """The norm between site `index` and the read of one of its `read_modules`."""

    @abstractmethod
    def hook_residuals(self, hooks: Mapping[int, HookFunction]) -> AbstractContextManager[None]:
        """Inside, `hooks[i]` is called with the stream at site i, and may replace it, in the model's own passes.

        That is in `model(...)` and `model.generate(...)`, with or without a cache; not in the methods of this class.
        """

    @property
    def logits_width(self) -> int:
        """Logits of a token; over `vocab_size` where the unembedding is padded."""
        return self.vocab_size

    @property
    def computes_kept_logits_alone(self) -> bool:
        """Whether `logits_at` spares the logits of the tokens that are not asked for."""
        return False

    @property
    def device(self) -> torch.device:
        """The device that token ids must be on."""
        return input_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stream."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def index(self, site: str | int) -> int:
        """The index of a site given by name or index; ValueError lists the model's sites."""
        if isinstance(site, int):
            if -len(self.sites) <= site < len(self.sites):
                return site % len(self.sites)
        elif site in self.sites:
            return self.sites.index(Site(site))
        raise ValueError(f"site={site!r} is not a site of this model; it has {', '.join(self.sites)}")

    def run(self, start: int, stop: int, residual: Tensor, context: Context) -> Tensor:
        """The stream at site `stop`, from the stream at site `start`."""
        if residual.requires_grad:
            self.check_differentiable()
        for index in range(start, stop):
            residual = self.sublayer(index, residual, context)
        return residual

    def empty_prefix(self) -> PrefixCache | None:
        """A cache for `run_prefix` to fill; None where the model keeps other states than attention's."""
        return None

    def run_prefix(
        self, prefix: PrefixCache, input_ids: Int[Tensor, "b p"], attention_mask: Int[Tensor, "b p"] | None = None
    ) -> PrefixCache:
        """Run the tokens that rows begin with, and keep their keys and values for a `context` of those after them.

        They are kept in `prefix`, from `empty_prefix`, which is returned.
        """
        context = self.context(input_ids, attention_mask, prefix)
        self.run(0, len(self.sites) - 1, context.embedding, context)
        prefix.full = True
        return prefix

    def tail(self, index: int, residual: Tensor, context: Context) -> Tensor:
        """Logits from the stream at site `index`."""
        return self.head(self.run(index, len(self.sites) - 1, residual, context), context)

    def trace(
        self,
        input_ids: Int[Tensor, "b s"],
        attention_mask: Int[Tensor, "b s"] | None = None,
        differentiable: bool = False,
        with_logits: bool = True,
        last_site: int | None = None,
    ) -> Trace:
        """Run all sublayers and the head, and keep the stream at every site.

        `differentiable`: build a graph from the first stream on, of a frozen model too, so that every stream has a
        gradient with respect to the logits. Without `with_logits` the head is not run, and the logits have width 0;
        the sublayers from site `last_site` on are not run either, and the streams end there.
        """
        context = self.context(input_ids, attention_mask)
        return self.trace_in(context, differentiable, with_logits, last_site)

    def trace_in(
        self, context: Context, differentiable: bool = False, with_logits: bool = True, last_site: int | None = None
    ) -> Trace:
        """`trace` of the tokens of a context, which may come after a prefix."""
        stop = len(self.sites) - 1 if with_logits or last_site is None else last_site
        if differentiable:
            self.check_differentiable()
        with torch.set_grad_enabled(differentiable or torch.is_grad_enabled()):
            residuals = [context.embedding.detach().requires_grad_() if differentiable else context.embedding]
            for index in range(stop):
                residuals.append(self.sublayer(index, residuals[-1], context))
            logits = self.head(residuals[-1], context) if with_logits else residuals[-1][..., :0]
            return Trace(residuals, logits, context)

    def check_differentiable(self) -> None:
        """ValueError if no gradient can pass through the model, since its weights are inference tensors."""
        # A pass under inference_mode leaves inference placeholders of offloaded weights, which are made anew.
        first = next((p for p in self.model.parameters() if not p.is_meta), None)
        if torch.is_inference_mode_enabled() or first is None or not first.is_inference():
            return
        name = getattr(getattr(self.model, "config", None), "model_type", type(self.model).__name__)
        raise ValueError(
            f"model={name!r} was made under torch.inference_mode(), so that no gradient can pass through its weights; "
            "load it outside (torch.no_grad() is as good), or fit with steps=0"
        )

    def hooked_module(self, index: int) -> nn.Module:
        """The smallest module that contains the hooks at site `index`, on its stream and on its reads."""
        return self.model

    def residuals(
        self, input_ids: Int[Tensor, "b s"], attention_mask: Int[Tensor, "b s"] | None = None
    ) -> tuple[list[Float[Tensor, "b s d"]], Float[Tensor, "b s vocab"]]:
        """The stream at every site, a list of [batch, seq, d_model], and the logits [batch, seq, vocab]."""
        trace = self.trace(input_ids, zero_one_mask(attention_mask, input_ids))
        return trace.residuals, trace.logits

    def run_from(
        self,
        site: str | int,
        residual: Float[Tensor, "b s d"],
        input_ids: Int[Tensor, "b s"],
        attention_mask: Int[Tensor, "b s"] | None = None,
    ) -> Float[Tensor, "b s vocab"]:
        """Logits [batch, seq, vocab] when the stream at `site` (name or index) is `residual` [batch, seq, d_model].

        Only the sublayers after the site are run.
        """
        context = self.context(input_ids, zero_one_mask(attention_mask, input_ids))
        return self.tail(self.index(site), residual, context)

    def logits_at(
        self, residual: Float[Tensor, "b s d"], context: Context, tokens: Int[Tensor, " kept"]
    ) -> Float[Tensor, "b kept vocab"]:
        """Logits from the stream at `final`, at some of a row's tokens, given by ascending indices.

        The logits of the others are not computed, where the model can leave them out.
        """
        return self.head(residual, context)[:, tokens.to(residual.device)]

    def reads(
        self,
        input_ids: Int[Tensor, "b s"],
        attention_mask: Int[Tensor, "b s"] | None = None,
        sites: Sequence[str | int] | None = None,
    ) -> list[Float[Tensor, "b s d"]]:
        """What sublayers read, a list of [batch, seq, d_model]: their module's input, after the norm.

        At every site, or at these `sites` (names or indices). Sublayers after the last of them are not run, and logits
        are not computed.
        """
        return self.reads_in(self.context(input_ids, zero_one_mask(attention_mask, input_ids)), sites)

    def reads_in(self, context: Context, sites: Sequence[str | int] | None = None) -> list[Float[Tensor, "b s d"]]:
        """`reads` of the tokens of a context, which may come after a prefix."""
        wanted = range(len(self.sites)) if sites is None else [self.index(site) for site in sites]
        reads: dict[int, list[Tensor]] = {index: [] for index in wanted}
        last = len(self.sites) - 1
        with self.hook_reads({index: read.append for index, read in reads.items()}):
            stream = self.run(0, min(max(wanted, default=-1) + 1, last), context.embedding, context)
            if last in reads:
                unembedding = self.read_modules(last)[0]
                with replaced_forwards({unembedding: lambda read, *_, **__: read[..., :1]}):
                    self.head(stream, context)
        return [reads[index][-1] for index in wanted]

    def hook_reads(self, hooks: Mapping[int, HookFunction]) -> AbstractContextManager[None]:
        """Inside, `hooks[i]` is called with the read of site i in every pass, and may replace it."""
        return self.hook_modules({self.read_modules(index)[0]: hook for index, hook in hooks.items()})

    @contextmanager
    def hook_modules(self, hooks: Mapping[nn.Module, HookFunction]) -> Iterator[None]:
        """Inside, each module's hook is called with what the module reads of the stream, and may replace it."""
        with uncompiled(), ExitStack() as stack:
            for module, hook in hooks.items():
                before = input_hook(hook, self.d_model)
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            yield


def input_hook(hook: HookFunction, d_model: int) -> Callable[..., Any]:
    """A forward pre-hook that calls `hook` with the leading d_model channels of a module's first input."""

    def pre_hook(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        whole = args[0] if args else kwargs["hidden_states"]
        changed = hook(whole[..., :d_model])
        if changed is None:
            return None
        if whole.shape[-1] > d_model:  # position channels, concatenated after the stream's own, cannot be changed
            changed = torch.cat([changed, whole[..., d_model:]], dim=-1)
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    return pre_hook


def context_limit(*models: ResidualModel) -> int | None:
    """The largest number of tokens in a row that all models take, None where none sets a limit."""
    return min((m.context_length for m in models if m.context_length is not None), default=None)


def input_device(model: nn.Module) -> torch.device:
    """The device for token ids: that of the first parameter, or where accelerate brings it when it is offloaded."""
    module, parameter = next((m, p) for m in model.modules() for p in m.parameters(recurse=False))
    hook = getattr(module, "_hf_hook", None)
    devices = [getattr(one, "execution_device", None) for one in getattr(hook, "hooks", [hook])]
    if parameter.device.type != "meta" or devices[0] is None:
        return parameter.device
    return torch.device(devices[0])
