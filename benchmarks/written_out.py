"""One training step on the paper's objective (A.3), written out as one would first write it: what fit is compared with.

PyTorch alone: the modules of both models called in order, AbsTopK and the weight projection by `torch.topk` (unsorted,
as a careful person would have it), attention with a sink by its matrix of weights, the logits of every hybrid pass in
memory, the sum of all losses, one `backward`, AdamW.
"""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F


def topk(x: Tensor, k: int) -> Tensor:
    """The k entries of largest magnitude of every row."""
    kept = x.abs().topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(x).scatter(-1, kept, x.gather(-1, kept))


class TopK(torch.nn.Module):
    """In the place of a sparse model's AbsTopK."""

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        """Over the last dimension."""
        return topk(x, self.k)


def use_torch_alone(sparse) -> None:
    """Replace every AbsTopK and every attention of a `SparseTransformer`, in place."""
    for block in sparse.transformer.h:
        block.attn._attend = lambda q, k, v, allowed, attn=block.attn: attn.weights(q, k, allowed) @ v
    for parent in list(sparse.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "AbsTopK" and child.k is not None:
                setattr(parent, name, TopK(child.k))


def dense_sublayers(dense):
    """A GPT-2's attentions and MLPs in order: functions of the stream."""
    for block in dense.transformer.h:
        yield lambda h, b=block: h + b.attn(b.ln_1(h))[0]
        yield lambda h, b=block: h + b.mlp(b.ln_2(h))


def sparse_sublayers(sparse, positions, allowed):
    """A `SparseTransformer`'s attentions and MLPs in order."""
    for block in sparse.transformer.h:
        yield lambda z, b=block: b.attention(z, positions, allowed)
        yield lambda z, b=block: b.feed_forward(z, positions)


def streams(first, sublayers):
    """The stream at every site."""
    found = [first]
    for sublayer in sublayers:
        found.append(sublayer(found[-1]))
    return found


def nmse(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error over variance, both over the tokens after each row's first."""
    prediction, target = prediction[:, 1:].flatten(0, 1), target[:, 1:].flatten(0, 1)
    return (prediction - target).square().sum() / (target - target.mean(0)).square().sum()


def kl(target_logits: Tensor, logits: Tensor) -> Tensor:
    """Mean KL per token, nats."""
    log_p, log_q = target_logits.log_softmax(-1).flatten(0, 1), logits.log_softmax(-1).flatten(0, 1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


class WrittenOut:
    """The models, the bridges and their optimisers.

    `dense`: a GPT2LMHeadModel. `sparse`: a `SparseTransformer` of equal depth, changed in place. `bridges`: modules
    with the four tensors of a `Bridge` and its k, one per site. `kept`: the fraction of weights that the projection
    leaves; None: the sparse model is frozen. `fixed`: zeros stay zero, and nothing is projected. `autocast`: gives the
    context of the forward passes.
    """

    def __init__(self, dense, sparse, bridges, kept=None, fixed=False, lr=1e-3, sparse_lr=2.5e-3, autocast=nullcontext):
        self.dense, self.sparse, self.bridges = dense.eval().requires_grad_(False), sparse, list(bridges)
        self.kept, self.autocast = kept, autocast
        use_torch_alone(sparse)
        sparse.requires_grad_(kept is not None)
        maps = [parameter for bridge in self.bridges for parameter in bridge.parameters()]
        self.optimizers = [torch.optim.AdamW(maps, lr=lr, weight_decay=0.0)]
        if kept is not None:
            self.optimizers.append(torch.optim.AdamW(sparse.parameters(), lr=sparse_lr, betas=(0.9, 0.95)))
        self.masks = {name: weight != 0 for name, weight in pruned(sparse)} if fixed else None

    def losses(self, ids: Tensor):
        """The four losses of every site, in lists, and the sparse model's cross-entropy."""
        dense, sparse, n = self.dense, self.sparse, len(self.bridges)
        at = torch.arange(ids.shape[1], device=ids.device)
        embedded = dense.transformer.wte(ids) + dense.transformer.wpe(at)
        run_dense = list(dense_sublayers(dense))
        position_ids, allowed = sparse.prepare(ids)
        run_sparse = list(sparse_sublayers(sparse, sparse.positions(position_ids), allowed))
        h, z = streams(embedded, run_dense), streams(sparse.embed(ids, position_ids), run_sparse)

        def dense_logits(stream):
            return dense.lm_head(dense.transformer.ln_f(stream))

        target = dense_logits(h[-1])
        found = [[], [], [], []]
        for i, bridge in enumerate(self.bridges):
            encoded = topk(F.linear(h[i], bridge.encoder_weight, bridge.encoder_bias), bridge.k)
            decoded = F.linear(z[i], bridge.decoder_weight, bridge.decoder_bias)
            found[0].append(nmse(encoded, z[i].detach()))
            found[1].append(nmse(decoded, h[i]))
            found[2].append(kl(target, sparse.unembed(streams(encoded, run_sparse[i:])[-1], ids)))
            found[3].append(kl(target, dense_logits(streams(decoded, run_dense[i:])[-1])))
        assert n == len(h)
        logits = sparse.unembed(z[-1], ids)
        return found, F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def step(self, ids: Tensor) -> float:
        """One step on a batch; returns the loss."""
        with self.autocast():
            found, ce = self.losses(ids)
        loss = sum(torch.stack(losses).mean() for losses in found)
        loss = loss if self.kept is None else loss + ce
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        if self.masks is not None:
            for name, weight in pruned(self.sparse):
                weight.grad *= self.masks[name]
        for optimizer in self.optimizers:
            optimizer.step()
        if self.masks is None and self.kept is not None:
            self.project()
        return loss.item()

    @torch.no_grad()
    def project(self) -> None:
        """Zero all but the largest entries of every matrix and bias of the sparse model."""
        for _, weight in pruned(self.sparse):
            flat = weight.view(-1)
            kept = flat.abs().topk(max(1, round(self.kept * flat.numel())), sorted=False).indices
            flat.copy_(torch.zeros_like(flat).index_copy_(0, kept, flat[kept]))


def pruned(sparse):
    """Names and tensors of the matrices and biases that are sparse."""
    return [(name, p) for name, p in sparse.named_parameters() if "ln_" not in name and "sink" not in name]
