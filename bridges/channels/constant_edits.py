"""constant_edits(): a counterfactual edit as one number per channel, which can be saved and exported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from bridges.bridge import BridgeSet
from bridges.channels.find import CHOSEN_ON
from bridges.channels.prompts import Channels, check_channels, frozen_pair, resolve_task
from bridges.channels.runs import Prompts
from bridges.io.progress import Bar, progress_bar
from bridges.models.residual import ResidualModel
from bridges.steering.edits import Edit
from bridges.tasks.pairs import TaskPairs


def constant_edits(
    dense: nn.Module | ResidualModel | str | Path,
    sparse: nn.Module | ResidualModel | str | Path,
    bridge_set: BridgeSet,
    chosen: Channels,
    task: str | TaskPairs,
    direction: Literal[0, 1] = 0,
    n: int = CHOSEN_ON,
    *,
    tokenizer: Any = None,
    seed: int = 0,
    check_models: bool = True,
    progress: bool = True,
) -> list[Edit]:
    """Make the counterfactual edit of channels a constant one, for `save_edits` and `export_direction`.

    `dense`, `sparse`: model objects, `ResidualModel`s, folders or hub ids. Each edit adds, at every position, the mean
    over `n` pairs of the task of the channel's change at the token where it is largest, in read units. `direction`
    is the task order: 0 takes the task's first prompt to its second, 1 the second to the first. Raises ValueError if an
    argument is out of range, if the channels do not exist, or if no pair has that task order. `progress=False` silences
    the bar on standard error.

    >>> import bridges, torch
    >>> pair = bridges.load_pair()
    >>> rows = torch.randint(1024, (64, 32), generator=torch.Generator().manual_seed(0))
    >>> bridge_set = bridges.fit(pair.dense, pair.sparse, rows, steps=0, ridge=0.1, sites=("0.mlp",), progress=False)
    >>> chosen = bridges.Channels("0.mlp", (3, 18), at="residual")
    >>> edits = bridges.constant_edits(
    ...     pair.dense, pair.sparse, bridge_set, chosen, "for_while", n=8, tokenizer=pair.tokenizer
    ... )
    >>> [(edit.site, edit.channel, edit.mode) for edit in edits]
    [('0.mlp', 3, 'add'), ('0.mlp', 18, 'add')]
    """
    if direction not in (0, 1) or n < 2:
        raise ValueError(f"direction={direction} must be 0 or 1, and n={n} at least 2: pairs alternate in task order")
    with frozen_pair(dense, sparse, bridge_set, check_models) as pair:
        check_channels(pair, chosen)
        pairs = resolve_task(task, dense, tokenizer, n, seed)
        if not (pairs.direction == direction).any():
            raise ValueError(
                f"direction={direction}: none of the task's {len(pairs.direction)} pairs has this task order"
            )
        i = bridge_set.index(chosen.site)
        bridge = bridge_set[i]
        with progress_bar(f"constant edits, {pairs.task}", len(pairs), progress) as bar:
            dz = constant_changes(Prompts(pair, pairs), i, chosen.channels, bar)[direction]
        # The bridges may be on another device than the sparse model.
        values = dz.to(bridge.gain_sparse) * bridge.gain_sparse / bridge.rms_sparse
    return [Edit(chosen.site, channel, values[channel].item(), "add") for channel in chosen.channels]


def constant_changes(
    prompts: Prompts, bridge: int, channels: Sequence[int], bar: Bar | None = None
) -> Float[Tensor, "2 d_sparse"]:
    """dz of the channels as one number each, per task order: the mean over prompts of the largest change."""
    parts = []
    for run in prompts.runs([bridge]):
        dz = run.dz[bridge][..., list(channels)]
        largest = dz.gather(1, dz.abs().argmax(1, keepdim=True)).squeeze(1)
        parts.append((run.rows, largest.T))
        if bar is not None:
            bar.advance(len(run.rows))
    largest, direction = prompts.gather(parts), prompts.pairs.direction
    changes = largest.new_zeros(2, prompts.pair.sparse.d_model)
    for order in (0, 1):
        changes[order, list(channels)] = largest[:, direction.to(largest.device) == order].mean(1)
    return changes
