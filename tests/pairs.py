"""Tiny pairs of models, a padded batch, and the method written out the slow way: the oracle of several tests."""

from itertools import pairwise

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from bridges.bridge import Bridge, BridgeSet
from bridges.models.loading import as_residual
from bridges.models.pairing import pair_sites
from bridges.models.sparse.model import SparseConfig, SparseTransformer
from bridges.objective.pair import ModelPair
from bridges.steering.edits import Edit
from bridges.steering.steer import steer
from bridges.tasks.pairs import TaskPairs

VOCAB, CONTEXT = 17, 12

MASK = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0]])
"""No padding, left, right, and a row of a single token, which NMSE does not count."""


def tokens(rows=4, width=7, seed=5):
    return torch.randint(0, VOCAB, (rows, width), generator=torch.Generator().manual_seed(seed))


def scrambled(model, dtype=torch.float64, std=0.35, seed=0):
    """Weights large enough that every part of the model matters to its logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * std + (parameter.ndim == 1) * 0.3)
    return model.to(dtype).eval()


def gpt2(layers=2, width=8, vocab=VOCAB, context=CONTEXT, dtype=torch.float64, seed=1):
    torch.manual_seed(seed)
    shape = {"n_embd": width, "n_layer": layers, "n_head": 2, "vocab_size": vocab, "n_positions": context}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return scrambled(GPT2LMHeadModel(GPT2Config(**shape, **ends)), dtype, seed=seed)


def neox(layers=2, width=8, dtype=torch.float64, seed=3):
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2}
    limits = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 0}
    return scrambled(GPTNeoXForCausalLM(GPTNeoXConfig(**shape, **limits)), dtype, seed=seed)


def sparse_model(layers=2, width=12, dtype=torch.float64, seed=2, **options):
    torch.manual_seed(seed)
    shape = {"n_layer": layers, "d_model": width, "n_head": 2, "d_head": 4, "d_mlp": 16, "afrac": 0.5}
    shape |= {"vocab_size": VOCAB, "block_size": CONTEXT, "enable_bigram_table": True, "learnable_bigram_table": True}
    return scrambled(SparseTransformer(SparseConfig(**{**shape, **options})), dtype, seed=seed)


def join(dense, sparse, k=4, seed=7, site_map=None):
    """The pair with random bridges, as `ModelPair`."""
    chains = as_residual(dense), as_residual(sparse)
    pairs = pair_sites(*chains, site_map)
    dtype = torch.promote_types(chains[0].dtype, torch.float32)
    bridges = [Bridge(chains[0].d_model, chains[1].d_model, k, dtype) for _ in pairs]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for bridge in bridges for p in bridge.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return ModelPair(*chains, BridgeSet([(p.dense, p.sparse) for p in pairs], bridges))


def with_units(pair):
    """The pair's bridges with R and gains as `fit` would set them, R made up."""
    for i, bridge in enumerate(pair.bridge_set):
        bridge.rms_dense.fill_(1.5 + i)
        bridge.rms_sparse.fill_(0.5 + i)
        bridge.gain_sparse.copy_(pair.sparse.norm(pair.site("sparse", i)).gain)
    return pair


def toy_task(seed=5, rows=6):
    """Pairs that differ in one token, answered by one token or by a set of two."""
    ids = tokens(rows=rows, seed=seed)
    other = ids.clone()
    other[:, 2] = (other[:, 2] + 3) % 17
    answers = torch.tensor([[3, -1], [4, 6]] * (rows // 2))
    return TaskPairs("toy", ids, other, torch.ones_like(ids), answers, answers.roll(1, 0), torch.arange(rows) % 2)


def relative(one, other):
    """Largest difference over the largest entry."""
    return ((one - other).abs().max() / other.abs().max().clamp(min=1e-300)).item()


def gradients(parameters):
    """Copies of what arrived, zeros where nothing did, and clears them."""
    found = []
    for parameter in parameters:
        found.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone())
        parameter.grad = None
    return found


# What follows is method section 2 in loops, sharing no code with the package but the models themselves.


def naive_abs_topk(x, k):
    kept = torch.zeros_like(x)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])).view(-1, x.ndim - 1).tolist():
        order = sorted(range(x.shape[-1]), key=lambda c, at=tuple(place): -abs(x[at][c].item()))
        kept[tuple(place)][order[:k]] = 1.0
    return x * kept


def naive_encode(bridge, h):
    return naive_abs_topk(h @ bridge.encoder_weight.T + bridge.encoder_bias, bridge.k)


def naive_decode(bridge, z):
    return z @ bridge.decoder_weight.T + bridge.decoder_bias


def real_places(ids, mask):
    """(row, place) of every token that is no padding."""
    rows, width = ids.shape
    return [(b, t) for b in range(rows) for t in range(width) if mask is None or mask[b, t]]


def counted_places(ids, mask):
    """The same without each row's first."""
    real = real_places(ids, mask)
    return [place for before, place in pairwise(real) if before[0] == place[0]]


def at(tensor, places):
    return torch.stack([tensor[place] for place in places])


def naive_variance(target):
    target = target.detach()
    return sum(((row - target.mean(0)) ** 2).sum() for row in target)


def naive_nmse(prediction, target):
    return ((prediction - target) ** 2).sum() / naive_variance(target)


def naive_kl(target_logits, logits, places):
    """Mean over tokens, nats."""
    total = 0.0
    for place in places:
        p = target_logits[place].detach().exp() / target_logits[place].detach().exp().sum()
        q = logits[place].exp() / logits[place].exp().sum()
        total = total + (p * (p / q).log()).sum()
    return total / len(places)


def naive_ce(logits, ids, mask):
    """Mean over tokens that a real one follows, nats."""
    terms = []
    for (row, place), (next_row, next_place) in pairwise(real_places(ids, mask)):
        if row == next_row:
            p = logits[row, place].exp() / logits[row, place].exp().sum()
            terms.append(-p[ids[next_row, next_place]].log())
    return sum(terms) / len(terms)


def naive_losses(pair, ids, mask=None):
    """The four losses at every bridged site, a list of scalars each, and the sparse model's cross-entropy."""
    h_dense, y_dense = pair.dense.residuals(ids, mask)
    h_sparse, y_sparse = pair.sparse.residuals(ids, mask)
    real, counted = real_places(ids, mask), counted_places(ids, mask)
    columns = [[], [], [], []]
    for (dense_site, sparse_site), bridge in zip(pair.bridge_set.site_pairs, pair.bridge_set, strict=True):
        h, z = h_dense[pair.dense.sites.index(dense_site)], h_sparse[pair.sparse.sites.index(sparse_site)]
        encoded, decoded = naive_encode(bridge, h), naive_decode(bridge, z)
        columns[0].append(naive_nmse(at(encoded, counted), at(z, counted).detach()))
        columns[1].append(naive_nmse(at(decoded, counted), at(h, counted).detach()))
        columns[2].append(naive_kl(y_dense, pair.sparse.run_from(sparse_site, encoded, ids, mask), real))
        columns[3].append(naive_kl(y_dense, pair.dense.run_from(dense_site, decoded, ids, mask), real))
    return columns, naive_ce(y_sparse, ids, mask)


def naive_objective(pair, weights, ids, mask=None, sampled=None):
    """L of method section 2; with `sampled`, the KLs at those sites alone, mean over them."""
    (encode, decode, to_sparse, to_dense), ce = naive_losses(pair, ids, mask)
    sampled = range(len(encode)) if sampled is None else sampled
    loss = sum(weights.nmse * (e + d) for e, d in zip(encode, decode, strict=True)) / len(encode)
    for i in sampled:
        hybrid = weights.kl_dense_to_sparse * to_sparse[i] + weights.kl_sparse_to_dense * to_dense[i]
        loss = loss + hybrid / len(sampled)
    return loss, ce


def naive_path_kl(pair, path, ids, mask=None):
    """The KL of a hybrid pass along a path of first letters, sublayer by sublayer."""
    chains, names = {"d": pair.dense, "s": pair.sparse}, ["d", "s"]
    y = pair.dense.residuals(ids, mask)[1]
    stream = chains[path[0]].residuals(ids, mask)[0][0]
    at = 0
    for i, sites in enumerate(pair.bridge_set.site_pairs):
        chain = chains[path[i]]
        stop = chain.index(sites[names.index(path[i])])
        context = chain.context(ids, mask)
        for j in range(at, stop):
            stream = chain.sublayer(j, stream, context)
        if path[i] != path[i + 1]:
            stream = (naive_encode if path[i] == "d" else naive_decode)(pair.bridge_set[i], stream)
        at = chains[path[i + 1]].index(sites[names.index(path[i + 1])])
    site = pair.bridge_set.site_pairs[-1][names.index(path[-1])]
    return naive_kl(y, chains[path[-1]].run_from(site, stream, ids, mask), real_places(ids, mask))


def kl_of_turning_off(pair, text, chosen):
    """Nats per token, by `steer` on the text and the sum over the vocabulary written out."""
    edits = [Edit(chosen.site, channel, 0.0) for channel in chosen.channels]
    dense, sparse = pair.dense.model, pair.sparse.model
    with torch.no_grad():
        plain = dense(text).logits.log_softmax(-1)
        with steer(dense, pair.bridge_set, edits, sparse=sparse, at=chosen.at):
            off = dense(text).logits.log_softmax(-1)
    return (plain.exp() * (plain - off)).sum(-1).mean().item()
