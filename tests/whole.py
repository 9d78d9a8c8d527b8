"""A task's pairs run all at once, and edits of channels on them written out: the oracle of `bridges.channels`."""

from typing import NamedTuple

import torch

from bridges.objective.pair import Traces, trace_pair
from bridges.tasks.pairs import TaskPairs


class Whole(NamedTuple):
    """Both models' passes on all prompts, with all logits, and the changes of the sparse model's reads and stream."""

    pairs: TaskPairs
    traces: Traces
    dn: list
    dz: list


def whole_run(pair, pairs):
    """In one batch, at every site."""
    with torch.no_grad():
        traces = trace_pair(pair, pairs.input_ids, pairs.attention_mask)
        before, after = (
            pair.sparse.reads(x, pairs.attention_mask) for x in (pairs.input_ids, pairs.counterfactual_ids)
        )
    dn, dz = [], []
    for i, bridge in enumerate(pair.bridge_set):
        site = pair.site("sparse", i)
        dn.append((after[site] - before[site]) * pairs.attention_mask[..., None])
        dz.append(dn[-1] * bridge.rms_sparse / bridge.gain_sparse)
    return Whole(pairs, traces, dn, dz)


def written_addend(pair, run, chosen, side="dense"):
    """What the counterfactual edit adds to a stream or read, channel by channel."""
    i = pair.bridge_set.index(chosen.site)
    bridge, norm = pair.bridge_set[i], pair.dense.norm(pair.site("dense", i))
    if side == "sparse":
        addend = torch.zeros_like(run.dz[i])
        for channel in chosen.channels:
            addend[..., channel] = (run.dz if chosen.at == "residual" else run.dn)[i][..., channel]
        return addend
    addend = 0.0
    for channel in chosen.channels:
        addend = addend + run.dz[i][..., channel, None] * bridge.decoder_weight.detach()[:, channel]
    if chosen.at == "read":
        centred = addend - addend.mean(-1, keepdim=True) if norm.centred else addend
        addend = norm.gain * centred / bridge.rms_dense
    return addend


def written_logits(pair, run, chosen, strength=1.0, side="dense", addend=None):
    """All logits under the edit, or under an addend in its place: a whole pass from the edited site on."""
    model, site = pair.model(side), pair.site(side, pair.bridge_set.index(chosen.site))
    addend = strength * (written_addend(pair, run, chosen, side) if addend is None else addend)
    stream, ids, mask = run.traces.side(side).residuals[site], run.pairs.input_ids, run.pairs.attention_mask
    with torch.no_grad():
        if chosen.at == "residual":
            return model.run_from(site, stream + addend, ids, mask)
        with model.hook_reads({site: lambda read: read + addend}):
            return model.run_from(site, stream, ids, mask)


def written_p(logits, tokens):
    """The probability of each row's set of tokens after the last token."""
    p = logits[:, -1].softmax(-1)
    return torch.stack([sum(p[i, t] for t in row if t >= 0) for i, row in enumerate(tokens.tolist())])


def written_p_target(pair, run, chosen, strength=1.0, side="dense"):
    """P(target) of every prompt under the edit."""
    return written_p(written_logits(pair, run, chosen, strength, side), run.pairs.targets)
