"""The pair that the benchmarks of one training step run on: a GPT-2 and a weight-sparse transformer, random weights."""

from collections import Counter
from contextlib import contextmanager
from copy import deepcopy

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from written_out import WrittenOut

from bridges.config import FitConfig
from bridges.fit import sparse_modes
from bridges.fitting.processes import ProcessGroup
from bridges.fitting.trainer import Trainer
from bridges.fitting.untrained import untrained_pair
from bridges.models.loading import as_residual
from bridges.models.modes import frozen
from bridges.models.sparse.config import SparseConfig
from bridges.models.sparse.model import SparseTransformer
from bridges.sparsity.projection import project


def models(layers=2, d_dense=128, d_sparse=512, vocab=2048, seq=128, density=1 / 64, d_head=32, seed=0, device="cpu"):
    """A GPT-2 with heads of `d_head`, and a `SparseTransformer` of equal depth at a density."""
    torch.manual_seed(seed)
    shape = {"n_embd": d_dense, "n_layer": layers, "n_head": d_dense // d_head, "vocab_size": vocab, "n_positions": seq}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    dense = GPT2LMHeadModel(GPT2Config(**shape, **dropout, bos_token_id=0, eos_token_id=0)).eval()
    sparse = SparseTransformer(
        SparseConfig(n_layer=layers, d_model=d_sparse, d_head=16, vocab_size=vocab, block_size=seq, dropout=0.0)
    )
    dense, sparse = dense.to(device), sparse.to(device)
    project(sparse, density)
    return dense, sparse


KINDS = {
    "projected": {"train_sparse": True},
    "moving support": {"train_sparse": True, "support": "moving"},
    "fixed support": {"train_sparse": True},
    "frozen": {},
}
"""What trains of the sparse model: all weights, of which all but the largest are then zeroed; its nonzeros, which move
every `move_every` steps; its nonzeros; nothing."""
WITH_A_MOVE = "ours, with a move"
"""The step of ours after which the support moves, which `steps` gives beside the usual one where a support moves."""


@contextmanager
def steps(dense, sparse, density, kind, batch=8, seq=128, **settings):
    """Inside, {name: function that does one step and returns the loss}, of the written-out step and of ours.

    A function's `rows` are those of the batch that it takes; all by default. Where the support moves, a third one,
    `WITH_A_MOVE`, does the next step of ours that ends in a move, as if the steps up to it had been done.

    Both compute the same losses of the same models. The written-out step trains and projects all weights of the sparse
    model where its support moves in ours; where that is fixed it masks gradients.
    """
    settings = KINDS[kind] | settings
    if kind in ("projected", "moving support"):
        settings |= {"target_density": density, "start_density": density}
    joint = settings.get("train_sparse", False)
    ours, theirs = deepcopy(sparse), deepcopy(sparse)
    settings = {"steps": 10**6, "batch_size": batch, "seq_len": seq, "sites_per_step": "all"} | settings
    config = FitConfig(**settings)
    pair = untrained_pair(as_residual(dense), as_residual(ours), config)
    generator = torch.Generator().manual_seed(1)
    for bridge in pair.bridge_set:
        bridge.randomize(generator)
    batches = [torch.randint(dense.config.vocab_size, (batch, seq), generator=generator) for _ in range(4)]
    turns = Counter()

    def next_batch(name, rows):
        turns[name] += 1
        return batches[turns[name] % len(batches)][:rows].to(pair.dense.device)

    with ProcessGroup(config.mixed_precision) as processes, frozen(dense), sparse_modes(ours, config):
        options = {"kept": density if joint else None, "fixed": kind == "fixed support", "autocast": processes.autocast}
        written = WrittenOut(dense, theirs, deepcopy(list(pair.bridge_set)), **options)
        trainer = Trainer(pair, config, processes)

        def our_step(rows=None):
            return trainer.train_step([(next_batch("ours", rows), None)]).loss

        def our_step_with_a_move(rows=None):
            trainer.step += -(trainer.step + 1) % config.move_every
            return our_step(rows)

        functions = {"written out": lambda rows=None: written.step(next_batch("written out", rows)), "ours": our_step}
        yield functions | ({WITH_A_MOVE: our_step_with_a_move} if kind == "moving support" else {})
