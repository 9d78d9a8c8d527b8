"""What the interchange loss does, and its controls: python benchmarks/bench_interchange.py

The demo's closed form, without gradient steps, without the loss and with it. For every task the single channel that
does most to the dense model is searched for, as `bridges.sweep` does; P(target) of both models is on other prompts.
Controls, each searched alike:

- random columns: every decoder column in a random direction, its norm kept: what the search alone finds;
- inert channels: pairs choose what has most effect on the dense model among channels that do not help the sparse one;
- permuted sparse model: the entries of every matrix in another order. It knows nothing, so what it gains needs no
  mechanism that two models share.

`interchange` is the loss on its own pairs and on other ones; 1 is what no decoder at all leaves out.
"""

import argparse
import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

import bridges
from bridges.channels.find import CHOSEN_ON, find
from bridges.channels.prompts import frozen_pair
from bridges.channels.runs import Prompts, p_target_under_edit, p_target_unedited, part_solved
from bridges.channels.search import NoChannelsFoundError
from bridges.data.prepare import FitData
from bridges.data.rows import Rows
from bridges.demo import HELDOUT_DOCUMENTS, SETTINGS, TEXT_ROWS, TRAIN_DOCUMENTS, demo_rows
from bridges.fitting import interchange
from bridges.models.bundled import BundledPair
from bridges.tasks.pairs import TASKS, task_pairs

COLUMNS = (
    "| nmse_decode | kl_sparse_to_dense | interchange: own, other pairs | over 0.5 | both ways | mean P(target) "
    "| in the sparse model | site of the channels |"
)
OTHER_PAIRS = 256
CHOSEN = interchange.choose_channels


def inert(weight: Tensor, dz: Tensor, dense_gradient: Tensor, sparse_gradient: Tensor) -> tuple[Tensor, Tensor]:
    """In place of `choose_channels`: of the channels that do not help the sparse model, what helps the dense most."""
    in_dense = torch.einsum("bsd,dc,bsc->bc", dense_gradient, weight.to(dense_gradient), dz)
    in_dense = in_dense.masked_fill((sparse_gradient * dz).sum(1) > 0, -torch.inf)
    return in_dense.argmax(1), CHOSEN(weight, dz, dense_gradient, sparse_gradient)[1]


def permuted(pair: BundledPair) -> BundledPair:
    """The pair with the entries of every sparse matrix in another order."""
    sparse, generator = copy.deepcopy(pair.sparse), torch.Generator().manual_seed(0)
    for parameter in sparse.parameters():
        if parameter.ndim == 2:
            flat = parameter.data.flatten()
            parameter.data.copy_(flat[torch.randperm(len(flat), generator=generator)].view_as(parameter))
    return pair._replace(sparse=sparse)


def redrawn(bridge_set: bridges.BridgeSet) -> bridges.BridgeSet:
    """Every decoder column in a random direction, its norm kept."""
    generator, other = torch.Generator().manual_seed(0), copy.deepcopy(bridge_set)
    for bridge in other:
        weight = bridge.decoder_weight.data
        direction = torch.randn(weight.shape, generator=generator).to(weight)
        weight.copy_(direction / direction.norm(dim=0) * weight.norm(dim=0))
    return other


class Setting(NamedTuple):
    """What every row shares."""

    train: Tensor
    heldout: Tensor
    tasks: list[str]
    prompts: int


def fitted(pair: BundledPair, weight: float, setting: Setting) -> bridges.BridgeSet:
    settings: dict[str, Any] = {"steps": 0, "interchange_weight": weight, "progress": False}
    config = SETTINGS.with_settings(settings)
    return bridges.fit(pair.dense, pair.sparse, setting.train, eval_data=setting.heldout, config=config)


def losses(pair: BundledPair, bridge_set: bridges.BridgeSet, plain: bridges.BridgeSet, setting: Setting) -> str:
    """The interchange loss, mean over sites, on the pairs that a fit takes and on pairs from held-out rows.

    Their channels are chosen by the decoders of the plain fit, as a fit does.
    """
    means = []
    for rows, n in ((setting.train, SETTINGS.interchange_pairs), (setting.heldout, OTHER_PAIRS)):
        data = FitData(Rows(rows, seed=SETTINGS.seed), Rows(rows[:1]))
        batches = data.pair_batches(SETTINGS.with_settings({"interchange_pairs": n}), 0, 1)
        with frozen_pair(pair.dense, pair.sparse, plain, check_models=False) as models:
            terms = interchange.gather_quadratic_terms(models, batches, range(len(plain)))
        values = [term.loss(bridge.decoder_weight).item() for term, bridge in zip(terms, bridge_set, strict=True)]
        means.append(sum(values) / len(values))
    return f"{means[0]:.2f}, {means[1]:.2f}"


def searched(pair: BundledPair, bridge_set: bridges.BridgeSet, setting: Setting) -> str:
    """The single channel of every task that the dense model solves, on prompts that it was not chosen on."""
    p_dense, p_sparse, both_ways, sites = [], [], 0, []
    with frozen_pair(pair.dense, pair.sparse, bridge_set, check_models=False) as models:
        text = setting.train[:TEXT_ROWS]
        for task in setting.tasks:
            pairs = task_pairs(task, pair.tokenizer, CHOSEN_ON + setting.prompts)
            reported = Prompts(models, pairs.rows(CHOSEN_ON))
            if part_solved(models, reported) < 0.9:
                continue
            try:
                chosen = find(models, Prompts(models, pairs.rows(0, CHOSEN_ON)), text).best
            except NoChannelsFoundError:  # nothing to edit with: the task counts with the unedited models' P(target)
                p_dense.append(p_target_unedited(models, reported).mean().item())
                p_sparse.append(p_target_unedited(models, reported, "sparse").mean().item())
                sites.append("none within budget")
                continue
            p = p_target_under_edit(models, reported, chosen)
            p_dense.append(p.mean().item())
            p_sparse.append(p_target_under_edit(models, reported, chosen, side="sparse").mean().item())
            both_ways += min(p[reported.pairs.direction == side].mean().item() for side in (0, 1)) > 0.5
            sites.append(chosen.site)
    n = len(p_dense)
    where = ", ".join(
        f"{sites.count(site)} {site}" for site in (*bridge_set.sites, "none within budget") if site in sites
    )
    turned = sum(p > 0.5 for p in p_dense)
    return f"{turned} of {n} | {both_ways} | {sum(p_dense) / n:.3f} | {sum(p_sparse) / n:.3f} | {where}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", type=float, default=SETTINGS.interchange_weight)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--prompts", type=int, default=64)
    args = parser.parse_args()
    pair = bridges.load_pair()
    train, heldout = (
        demo_rows(pair, split, n, SETTINGS.seq_len or 128, SETTINGS.seed)
        for split, n in (("train", TRAIN_DOCUMENTS), ("heldout", HELDOUT_DOCUMENTS))
    )
    setting = Setting(train, heldout, args.tasks, args.prompts)
    print(f"| decoder {COLUMNS}\n|{'---|' * (COLUMNS.count('|'))}", flush=True)

    def row(name: str, of: BundledPair, bridge_set: bridges.BridgeSet, plain: bridges.BridgeSet | None) -> None:
        mean = bridge_set.report.to_dict()["mean"]  # pyright: ignore[reportOptionalMemberAccess]
        left = "" if plain is None else losses(of, bridge_set, plain, setting)
        figures = " | ".join("" if plain is None else f"{mean[n]:.3f}" for n in ("nmse_decode", "kl_sparse_to_dense"))
        print(f"| {name} | {figures} | {left} | {searched(of, bridge_set, setting)} |", flush=True)

    for name, of in (("", pair), (", permuted sparse model", permuted(pair))):
        plain, with_loss = fitted(of, 0.0, setting), fitted(of, args.weight, setting)
        row(f"without{name}", of, plain, plain)
        row(f"with{name}", of, with_loss, plain)
        if of is pair:
            row("without, random columns", of, redrawn(plain), None)
            row("with, random columns", of, redrawn(with_loss), None)
            interchange.choose_channels = inert
            row("with, inert channels", of, fitted(of, args.weight, setting), plain)
            interchange.choose_channels = CHOSEN


if __name__ == "__main__":
    main()
