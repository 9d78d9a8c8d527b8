"""Paths against a search through sets of names, node by node."""

import pytest
import torch
from pairs import sparse_model

from bridges.circuits.nodes import place_sizes
from bridges.circuits.paths import on_paths
from bridges.sparsity import projection


def successors(model):
    """Which nodes each node feeds, in names; and a function that names the reads of a stream channel from a site on."""
    feeds, width = {}, model.config.d_model

    def readers(site, channel):
        reads = [
            f"{layer}.{kind}.read.{channel}"
            for layer in range(len(model.blocks))
            for j, kind in enumerate(("attn", "mlp"))
            if 2 * layer + j >= site
        ]
        return [*reads, f"final.read.{channel}"]

    for layer, block in enumerate(model.blocks):
        heads, d_head = block.attn.n_head * block.attn.d_head, block.attn.d_head
        weight, bias = block.attn.c_attn.weight, block.attn.c_attn.bias

        def zero(row, weight=weight, bias=bias):
            return not weight[row].any() and bias[row] == 0

        for i in range(heads):
            targets = [f"{layer}.attn.write.{c}" for c in range(width) if block.attn.c_proj.weight[c, i] != 0]
            feeds[f"{layer}.attn.v.{i}"] = targets
            head = range(i // d_head * d_head, (i // d_head + 1) * d_head)
            of_head = [
                f"{layer}.attn.write.{c}" for c in range(width) for j in head if block.attn.c_proj.weight[c, j] != 0
            ]
            feeds[f"{layer}.attn.q.{i}"] = [] if zero(heads + i) else of_head
            feeds[f"{layer}.attn.k.{i}"] = [] if zero(i) else of_head
        for c in range(block.attn.c_attn.in_features):
            kinds = [("q", 0), ("k", heads), ("v", 2 * heads)]
            feeds[f"{layer}.attn.read.{c}"] = [
                f"{layer}.attn.{kind}.{i}" for kind, first in kinds for i in range(heads) if weight[first + i, c] != 0
            ]
            feeds[f"{layer}.mlp.read.{c}"] = [
                f"{layer}.mlp.neuron.{i}"
                for i in range(block.mlp.c_fc.out_features)
                if block.mlp.c_fc.weight[i, c] != 0
            ]
        for i in range(block.mlp.c_fc.out_features):
            feeds[f"{layer}.mlp.neuron.{i}"] = [
                f"{layer}.mlp.write.{c}" for c in range(width) if block.mlp.c_proj.weight[c, i] != 0
            ]
        for c in range(width):
            feeds[f"{layer}.attn.write.{c}"] = readers(2 * layer + 1, c)
            feeds[f"{layer}.mlp.write.{c}"] = readers(2 * layer + 2, c)
    return feeds, readers


def naive_paths(model, tokens, answers, allowed):
    feeds, readers = successors(model)
    ends = {f"final.read.{c}" for c in range(model.config.d_model) if model.lm_head.weight[answers, c].any()}
    starts = set()
    for token in tokens:
        for c in range(model.config.d_model):
            if model.transformer.wte.weight[token, c] != 0:
                starts |= set(readers(0, c))
    width = model.config.d_model
    for layer in range(len(model.blocks)):
        for c in range(width, model.blocks[0].attn.c_attn.in_features):
            starts |= {f"{layer}.attn.read.{c}", f"{layer}.mlp.read.{c}"}

    def reached(start, edges):
        seen, todo = set(), [node for node in start if node in allowed]
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                todo += [other for other in edges.get(node, []) if other in allowed]
        return seen

    backwards = {}
    for source, targets in feeds.items():
        for target in targets:
            backwards.setdefault(target, []).append(source)
    return reached(starts, feeds) & reached(ends, backwards)


@pytest.mark.parametrize("options", [{}, {"d_pos_emb": 3}], ids=["plain", "positions"])
@pytest.mark.parametrize("seed", range(4))
def test_nodes_on_paths_are_those_that_a_search_reaches_from_both_ends(options, seed):
    model = sparse_model(seed=seed, **options)
    projection.project(model, 0.06 + 0.03 * seed, min_per_channel=0)
    generator = torch.Generator().manual_seed(seed)
    sizes = place_sizes(model)
    on = {place: torch.rand(size, generator=generator) > 0.2 for place, size in sizes.items()}
    for given in (None, on):
        allowed = {f"{p}.{i}" for p, size in sizes.items() for i in range(size) if given is None or given[p][i]}
        found = on_paths(model, [1, 2, 5], [3, 4], given)
        names = {f"{place}.{int(i)}" for place, mask in found.items() for i in mask.nonzero()}
        assert names == naive_paths(model, [1, 2, 5], [3, 4], allowed)
