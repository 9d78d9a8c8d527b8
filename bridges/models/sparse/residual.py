"""A weight-sparse transformer as a `ResidualModel`, a chain of sublayers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bridges.models.modes import replaced_attribute, uncompiled
from bridges.models.prefix import PrefixCache
from bridges.models.residual import Context, HookFunction, Norm, ResidualModel, Site
from bridges.models.sparse.model import SparseTransformer


class BatchInputs(NamedTuple):
    """What all sublayers of one batch share."""

    position_ids: Int[Tensor, "b s"]
    """Ids, not embedded positions: sublayers that shared those would share an autograd graph."""
    allowed: Bool[Tensor, "#b 1 s t"]
    """Which keys each query may attend to."""
    prefix: PrefixCache | None
    """Keys and values of the tokens before these."""


class _HookedMethod(NamedTuple):
    """A method of the model that runs hooks on the stream it is given."""

    hooks: list[HookFunction]
    restore: ExitStack


_HOOKED_METHODS: WeakKeyDictionary[nn.Module, dict[str, _HookedMethod]] = WeakKeyDictionary()
"""The methods that have hooks now, by the module that has them and their name."""


class SparseResidual(ResidualModel):
    """A `SparseTransformer` with the sites `0.attn`, `0.mlp`, `1.attn`, ..., `final`; built by `as_residual`."""

    model: SparseTransformer

    def __init__(self, model: SparseTransformer):
        self.model = model
        layers = range(model.config.n_layer)
        self.sites = [Site(f"{layer}.{kind}") for layer in layers for kind in ("attn", "mlp")] + [Site("final")]
        self.d_model, self.vocab_size = model.config.d_model, model.config.vocab_size
        self.context_length = model.config.block_size

    @property
    def computes_kept_logits_alone(self) -> bool:
        """True."""
        return True

    def context(
        self,
        input_ids: Int[Tensor, "b s"],
        attention_mask: Int[Tensor, "b total"] | None = None,
        prefix: PrefixCache | None = None,
    ) -> Context:
        """Embed the tokens; raises ValueError when a row is longer than the model's `block_size`."""
        past = 0 if prefix is None else int(prefix.get_seq_length())
        inputs = BatchInputs(*self.model.prepare(input_ids, attention_mask, past), prefix)
        return Context(input_ids, attention_mask, self.model.embed(input_ids, inputs.position_ids), inputs)

    def sublayer(self, index: int, residual: Float[Tensor, "b s d"], context: Context) -> Float[Tensor, "b s d"]:
        """Attention at even indices, the MLP at odd ones."""
        block = self.model.blocks[index // 2]
        positions = self.model.positions(context.extra.position_ids)
        if index % 2:
            return block.feed_forward(residual, positions)
        return block.attention(residual, positions, context.extra.allowed, context.extra.prefix)

    def empty_prefix(self) -> PrefixCache:
        """A cache for `run_prefix` to fill."""
        return PrefixCache(config=self.model.config)

    def head(self, residual: Float[Tensor, "b s d"], context: Context) -> Float[Tensor, "b s vocab"]:
        """Final norm and unembedding, plus final_logits_bias and the bigram table's rows of the context's tokens."""
        return self.model.unembed(residual, context.input_ids)

    def logits_at(
        self, residual: Float[Tensor, "b s d"], context: Context, tokens: Int[Tensor, " kept"]
    ) -> Float[Tensor, "b kept vocab"]:
        """As `head`, of these tokens alone."""
        return self.model.unembed(residual, context.input_ids, tokens.to(residual.device))

    def read_modules(self, index: int) -> list[nn.Module]:
        """`c_attn`, `c_fc` or `lm_head`, whose input is the output of the norm and of AbsTopK."""
        if index == len(self.sites) - 1:
            return [self.model.lm_head]
        block = self.model.blocks[index // 2]
        return [block.mlp.c_fc if index % 2 else block.attn.c_attn]

    def norm(self, index: int, reader: int = 0) -> Norm:
        """The norm's weight as gain; a LayerNorm also centres."""
        if index == len(self.sites) - 1:
            norm = self.model.transformer.ln_f
        else:
            block = self.model.blocks[index // 2]
            norm = block.ln_2 if index % 2 else block.ln_1
        gain = norm.weight.detach()
        return Norm(gain.to(torch.promote_types(gain.dtype, torch.float32)), centred=not self.model.config.rms_norm)

    @contextmanager
    def hook_residuals(self, hooks: Mapping[int, HookFunction]) -> Iterator[None]:
        """Wraps the model's method that is called with the stream at a site."""
        with uncompiled(), ExitStack() as stack:
            for index, hook in hooks.items():
                if index == len(self.sites) - 1:
                    owner, name = self.model, "unembed"
                else:
                    owner, name = self.model.blocks[index // 2], "feed_forward" if index % 2 else "attention"
                stack.enter_context(_hook_method(owner, name, hook))
            yield


@contextmanager
def _hook_method(owner: nn.Module, name: str, hook: HookFunction) -> Iterator[None]:
    """Inside, the method runs the hook on the stream it is given.

    Its own method comes back when the last hook is gone, in whatever order they go.
    """
    methods = _HOOKED_METHODS.setdefault(owner, {})
    if name not in methods:
        methods[name] = _HookedMethod([], ExitStack())
        with_hooks = _with_hooks(getattr(owner, name), methods[name].hooks)
        methods[name].restore.enter_context(replaced_attribute(owner, name, with_hooks))
    hooked = methods[name]
    hooked.hooks.append(hook)
    try:
        yield
    finally:
        hooked.hooks.remove(hook)
        if not hooked.hooks:
            hooked.restore.close()
            del methods[name]


def _with_hooks(method: Callable[..., Any], hooks: list[HookFunction]) -> Callable[..., Any]:
    def call(residual: Tensor, *args: Any, **kwargs: Any) -> Any:
        for hook in hooks:
            changed = hook(residual)
            residual = residual if changed is None else changed
        return method(residual, *args, **kwargs)

    return call
