"""Can the sparse model of a pair be read? python benchmarks/bench_readability.py --sparse FOLDER --out runs/read.json

The table by which one pair is judged better than another. Per task, whether each model solves it, and P(target) under
counterfactual edits at strength 1 of

- the one channel that does most to the sparse model by itself: chosen by it, measured in it, without the dense one;
- the one channel, and the at most four of one site, that do most to both models (`find_channels(by="both")`).

Of the latter two: P(target) of both models; the worst way round (the least over both models and both task orders);
random directions of the same norm in the dense model; what ablating the channels costs the dense model on other text
(KL, nats per token); and R squared of the dense model's change regressed on the sparse model's (with other channels
that the cue changes). A task for which no channels are found counts as zeros, with the reason.

`changed` is at how many channels of a site the reads (after AbsTopK) of some pair's two prompts differ, at any token:
what `bridges.channels.agreement.changed_channels` counts, over all reported pairs. `changed_per_pair` is the median
over pairs of the same count for one pair.

Channels are chosen on 64 pairs and on rows of the training split; figures are of other pairs, half of them in each task
order, and of rows of the held-out split. Bridges that are not given are fitted in closed form and saved beside `--out`,
which is written after every task; a second call measures the tasks that it lacks.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any, NamedTuple

import torch
from readability_summary import COLUMNS, MOST, lines, means, row, summary
from torch import Tensor, nn

import bridges
from bridges.channels.agreement import intervention_agreement
from bridges.channels.attribution import top_channels
from bridges.channels.find import CHOSEN_ON
from bridges.channels.prompts import Channels, frozen_pair
from bridges.channels.reference_text import ReferenceText
from bridges.channels.runs import (
    Prompts,
    p_target_under_edit,
    p_target_under_random,
    p_target_unedited,
    part_solved,
)
from bridges.channels.search import BUDGET, NoChannelsFoundError, Search, SearchOptions, smallest_sufficient
from bridges.config import DEFAULT_SEQ_LEN
from bridges.data.corpus import bundled_documents, encode_documents, pack_rows
from bridges.demo import HELDOUT_DOCUMENTS, SETTINGS, TRAIN_DOCUMENTS
from bridges.io.files import read_json, write_json
from bridges.io.fingerprint import fingerprint
from bridges.models.bundled import load_pair
from bridges.models.loading import as_residual, find_tokenizer, load_model
from bridges.models.residual import context_limit
from bridges.objective.pair import SIDES, ModelPair
from bridges.tasks.pairs import TASKS, TaskPairs, task_pairs

RANDOM_DIRECTIONS = 5


class Options(NamedTuple):
    """What a task is measured with."""

    search: SearchOptions
    chosen_on: Tensor
    """Rows of the training split."""
    reported_on: Tensor
    """Rows of the held-out split."""


def measured(models: ModelPair, pairs: TaskPairs, options: Options) -> dict[str, Any]:
    """All figures of one task: channels are chosen on the first 64 pairs, and measured on the others."""
    chosen_on, reported = Prompts(models, pairs.rows(0, CHOSEN_ON)), Prompts(models, pairs.rows(CHOSEN_ON))
    changed, per_pair = changed_channels(models, reported)
    search = Search(models, chosen_on, options.chosen_on, options.search)
    alone = best_in_sparse(search)
    return {
        "solved": {side: part_solved(models, reported, side) for side in SIDES},
        "unedited": {side: p_target_unedited(models, reported, side).mean().item() for side in SIDES},
        "sparse_alone": {**named(alone), "p_sparse": ways_round(models, reported, alone)["sparse"][0]},
        "one": found(search, reported, options.reported_on, single=True),
        "four": found(search, reported, options.reported_on),
        "changed": changed,
        "changed_per_pair": per_pair,
    }


def changed_channels(models: ModelPair, prompts: Prompts) -> tuple[dict[str, int], dict[str, float]]:
    """Per site the channels that some pair changes at any token, and the median over pairs of one pair's."""
    sites = models.bridge_set.sites
    per_pair: list[list[Tensor]] = [[] for _ in sites]
    for run in prompts.runs(range(len(sites))):
        for i, of_site in enumerate(per_pair):
            of_site.append((run.dz[i] != 0).any(1))
    counts = [torch.cat(of_site) for of_site in per_pair]
    return (
        {site: int(one.any(0).sum()) for site, one in zip(sites, counts, strict=True)},
        {site: median(one.sum(1).tolist()) for site, one in zip(sites, counts, strict=True)},
    )


def best_in_sparse(search: Search) -> Channels:
    """The channel that does most to the sparse model, among those of largest predicted effect on it at every place."""
    effects = search.effects_on["sparse"]
    edits = [
        search.channels_at(at, (channel,))
        for at in effects
        for channel in top_channels(effects[at], search.options.candidates)
    ]
    search.run_edits(edits, side="sparse")
    return max(edits, key=lambda one: search.p_target_per_prompt(one, "sparse").mean().item())


def found(search: Search, reported: Prompts, text: Tensor, single: bool = False) -> dict[str, Any]:
    """What the channels that a search for both models finds do, on prompts and text that it has not seen."""
    try:
        chosen = smallest_sufficient(search.find_sets(single), "both")[-1].channels
    except NoChannelsFoundError as error:
        names = ("p_sparse", "p_dense", "worst", "p_random", "ablation_kl", "r_squared", "r_squared_shuffled")
        return {"channels": [], **dict.fromkeys(names, 0.0), "reason": str(error)}
    models, index = search.pair, search.pair.bridge_set.index(chosen.site)
    ways = ways_round(models, reported, chosen)
    agreement = intervention_agreement(models, reported, chosen)
    random = p_target_under_random(models, reported, chosen, RANDOM_DIRECTIONS, seed=1)
    return {
        **named(chosen),
        "p_sparse": ways["sparse"][0],
        "p_dense": ways["dense"][0],
        "by_direction": {side: ways[side][1:] for side in SIDES},
        "worst": min(p for side in SIDES for p in ways[side][1:]),
        "p_random": random.mean().item(),
        "ablation_kl": ReferenceText(models, text, {index: chosen.channels}).ablation_kl(chosen),
        "r_squared": agreement.r_squared,
        "r_squared_shuffled": agreement.r_squared_shuffled,
    }


def named(chosen: Channels) -> dict[str, Any]:
    """As JSON has them."""
    return {**chosen._asdict(), "channels": list(chosen.channels)}


def ways_round(models: ModelPair, reported: Prompts, chosen: Channels) -> dict[str, list[float]]:
    """Per model the mean P(target) under the edit, then that of either task order."""
    ways = {}
    for side in SIDES:
        p = p_target_under_edit(models, reported, chosen, side=side).cpu()
        orders = [p[reported.pairs.direction.cpu() == direction] for direction in (0, 1)]
        ways[side] = [one.mean().item() for one in (p, *orders)]
    return ways


def bridged(dense: nn.Module, sparse: nn.Module, train: Tensor, heldout: Tensor, tokens: int) -> bridges.BridgeSet:
    """Bridges by closed form alone, else as the demo's."""
    settings: dict[str, Any] = {"steps": 0, "closed_form_tokens": tokens, "progress": False}
    config = SETTINGS.with_settings({**settings, "seq_len": train.shape[1]})
    return bridges.fit(dense, sparse, train, eval_data=heldout, config=config)


def earlier(out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier call has measured; ValueError if it was of other models or with other settings."""
    if not out.is_file():
        return {"settings": dict(settings), "report": {}, "tasks": {}}
    content = read_json(out)
    if other := [name for name, value in settings.items() if content["settings"].get(name) != value]:
        raise ValueError(f"--out {out} was written with another {', '.join(other)}; pass another file")
    return content


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", default="", help="a model's folder; the bundled one if not given")
    parser.add_argument("--sparse", default="", help="a model's folder; the bundled one if not given")
    parser.add_argument("--bridges", default="", help="a bridge folder of both; fitted in closed form if not given")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, metavar="TASK")
    parser.add_argument("--prompts", type=int, default=64, help="pairs that figures are reported of, 2 at least")
    parser.add_argument("--rows", type=int, default=16, help="rows of text to choose on, and as many to report of")
    parser.add_argument("--candidates", type=int, default=12, help="as of find_channels")
    parser.add_argument("--budget", type=float, default=BUDGET, help="as of find_channels; inf: none")
    parser.add_argument("--closed-form-tokens", type=int, default=30_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/readability.json"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    args = parsed(arguments)
    os.environ["NUMBA_NUM_THREADS"] = str(args.threads)  # numba is first imported by a model's first pass
    torch.set_num_threads(args.threads)
    bundled = load_pair()
    dense = load_model(args.dense) if args.dense else bundled.dense
    sparse = load_model(args.sparse) if args.sparse else bundled.sparse
    tokenizer = (find_tokenizer(args.dense) if args.dense else None) or bundled.tokenizer
    bridge_set = bridges.BridgeSet.from_pretrained(args.bridges).float() if args.bridges else None
    settings = {name: getattr(args, name) for name in ("prompts", "rows", "candidates", "budget")}
    settings |= {"dense": fingerprint(dense), "sparse": fingerprint(sparse)}
    settings["bridges"] = args.closed_form_tokens if bridge_set is None else fingerprint(bridge_set)
    content = earlier(args.out, {**settings, "budget": str(args.budget)})  # JSON has no infinity

    width = min(DEFAULT_SEQ_LEN, context_limit(as_residual(dense), as_residual(sparse)) or DEFAULT_SEQ_LEN)
    train, heldout = (
        pack_rows(encode_documents(tokenizer, bundled_documents(split)[:n]), width, tokenizer.bos_token_id)
        for split, n in (("train", TRAIN_DOCUMENTS), ("heldout", HELDOUT_DOCUMENTS))
    )
    missing = [task for task in args.tasks if task not in content["tasks"]]
    if missing:
        folder = args.out.with_suffix(".bridges")  # those that were fitted before the first task
        if bridge_set is None and content["report"]:
            bridge_set = bridges.BridgeSet.from_pretrained(folder)
        elif bridge_set is None:
            bridge_set = bridged(dense, sparse, train, heldout, args.closed_form_tokens)
            bridge_set.save_pretrained(folder)
        report = bridge_set.report or bridges.evaluate(dense, sparse, bridge_set, heldout)
        content["report"] = means(report)
        write_json(args.out, content)
    search = SearchOptions(MOST, "both", args.budget, args.candidates).checked()
    options = Options(search, train[: args.rows], heldout[: args.rows])
    print(f"| {COLUMNS} |\n|{'---|' * (COLUMNS.count('|') + 1)}", flush=True)
    for task in args.tasks:
        if task in missing:
            start, cpu_start = perf_counter(), process_time()
            pairs = task_pairs(task, tokenizer, CHOSEN_ON + args.prompts)
            with frozen_pair(dense, sparse, bridge_set, check_models=True) as models:
                record = measured(models, pairs, options)
            taken = {"seconds": perf_counter() - start, "cpu_seconds": process_time() - cpu_start}
            content["tasks"][task] = record | taken
            content["summary"] = summary(content["tasks"])
            write_json(args.out, content)
        print(row(task, content["tasks"][task]), flush=True)
    print("", *lines(summary(content["tasks"]), content["report"]), sep="\n")
    return content


if __name__ == "__main__":
    main()
