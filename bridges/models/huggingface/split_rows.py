"""Whether a Hugging Face model's rows can be run in two parts: their first tokens once, what follows many times."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from bridges.models.huggingface.decompose import difference
from bridges.models.huggingface.recording import (
    base_model,
    model_inputs,
    probe_batches,
    text_config,
    without_autocast,
)
from bridges.models.prefix import PrefixCache, keeps_keys_and_values
from bridges.models.residual import ResidualModel
from bridges.models.tokens import Batch

SPLIT_AT = 4
"""Tokens of the probe's rows that run first."""


def runs_after_prefix(chain: ResidualModel) -> bool:
    """Whether the model's cache is of keys and values alone, and its sublayers give the same streams after a prefix."""
    batches = probe_batches(chain.model)
    return _has_plain_cache(chain.model, batches[0]) and all(_same_after_prefix(chain, batch) for batch in batches)


def _has_plain_cache(model: nn.Module, batch: Batch) -> bool:
    """Whether the model fills a cache of keys and values when it is asked for one."""
    if "past_key_values" not in inspect.signature(type(base_model(model)).forward).parameters:
        return False
    with without_autocast(model):
        output = model(**(model_inputs(model, *batch) | {"use_cache": True}))
    return keeps_keys_and_values(getattr(output, "past_key_values", None))


def _same_after_prefix(chain: ResidualModel, batch: Batch) -> bool:
    """At every site, and at the logits, up to rounding."""
    ids, mask = batch
    whole = chain.trace(ids, mask)
    empty = PrefixCache(config=text_config(chain.model))
    prefix = chain.run_prefix(empty, ids[:, :SPLIT_AT], None if mask is None else mask[:, :SPLIT_AT])
    counted = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    # As everywhere: eager attention gives NaN on left padding in float64.
    counted = (counted & whole.logits.isfinite().all(-1))[:, SPLIT_AT:]
    context = chain.context(ids[:, SPLIT_AT:], mask, prefix)
    split = [chain.trace_in(context) for _ in range(2)][-1]  # twice, since the first must leave nothing behind
    limit = max(1e-4, 100 * torch.finfo(whole.logits.dtype).eps)
    pairs = zip([*split.residuals, split.logits], [*whole.residuals, whole.logits], strict=True)
    return all(difference(after[counted], all_[:, SPLIT_AT:][counted]) <= limit for after, all_ in pairs)
