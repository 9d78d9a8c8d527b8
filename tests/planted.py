"""A sparse model with hand-written weights that does a task with exactly the nodes that are known."""

import torch

from bridges.models.sparse.config import SparseConfig
from bridges.models.sparse.model import SparseTransformer
from bridges.tasks.pairs import TaskPairs

BOS, CUE_A, CUE_B, END, ANSWER_A, ANSWER_B = range(6)
FILLERS = range(6, 12)
VOCAB = 12
PATH = ("0.attn.read.0", "0.attn.v.0", "0.attn.write.1", "final.read.1")
"""The cue's sign is read from channel 0, carried by v channel 0, written to channel 1 and read by the unembedding."""
SECOND_PATH = ("0.attn.read.2", "0.attn.v.4", "0.attn.write.3", "final.read.3")


def planted_model(redundant=False, noise=0.05, seed=0):
    """One layer, 16 channels; with `redundant` a second path does the same. Other weights are noise.

    No AbsTopK drops anything, so that what a node does is what its weights say.
    """
    torch.manual_seed(seed)
    config = SparseConfig(
        vocab_size=VOCAB, n_layer=1, d_model=16, n_head=4, d_head=4, d_mlp=8, block_size=16, afrac=1.0, sink=False
    )
    model = SparseTransformer(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.zero_()
        embed, unembed = model.transformer.wte.weight, model.lm_head.weight
        block = model.blocks[0]
        v = block.attn.c_attn.weight[32:]
        embed[:, 8:] = torch.randn(VOCAB, 8)  # what tells the tokens apart, which the task does not need
        for channel, value, write in ((0, 0, 1), (2, 4, 3))[: 1 + redundant]:
            embed[CUE_A, channel], embed[CUE_B, channel] = 2.0, -2.0
            v[value, channel] = 1.0
            block.attn.c_proj.weight[write, value] = 1.0
            unembed[ANSWER_A, write], unembed[ANSWER_B, write] = 3.0, -3.0
        v[8:12, 8:] = noise * torch.randn(4, 8)
        block.attn.c_proj.weight[4:8, 8:12] = noise * torch.randn(4, 4)
        block.mlp.c_fc.weight[:, 8:] = noise * torch.randn(8, 8)
        block.mlp.c_proj.weight[4:8] = noise * torch.randn(4, 8)
        unembed[:, 4:8] = noise * torch.randn(VOCAB, 4)
    return model


def planted_pairs(n=64, length=6, seed=0, shuffled=False):
    """Prompts of a cue somewhere among fillers, and END; with `shuffled` the answer has nothing to do with the cue."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(min(FILLERS), max(FILLERS) + 1, (n, length + 2), generator=generator)
    ids[:, 0], ids[:, -1] = BOS, END
    direction = torch.arange(n) % 2
    places = torch.randint(1, length + 1, (n,), generator=generator)
    other = ids.clone()
    ids[torch.arange(n), places] = torch.where(direction == 0, CUE_A, CUE_B)
    other[torch.arange(n), places] = torch.where(direction == 0, CUE_B, CUE_A)
    answers = torch.where(direction == 0, ANSWER_A, ANSWER_B)[:, None]
    targets = torch.where(direction == 0, ANSWER_B, ANSWER_A)[:, None]
    if shuffled:
        flipped = torch.randint(2, (n, 1), generator=generator).bool()
        answers, targets = torch.where(flipped, targets, answers), torch.where(flipped, answers, targets)
    return TaskPairs("planted", ids, other, torch.ones_like(ids), answers, targets, direction)


def planted_text(n=64, seed=9):
    """Rows of all tokens."""
    return torch.randint(VOCAB, (n, 10), generator=torch.Generator().manual_seed(seed))
