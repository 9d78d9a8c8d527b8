"""Which weights of the bundled sparse model can go? python benchmarks/bench_saliency.py

A share of each tensor's nonzero weights is set to zero, those of least saliency (as pretraining ranks them) or of least
magnitude, without training afterwards: KL from the dense model on held-out rows. Saliency takes the mean square of the
gradient of the KL over batches of training rows.
"""

import argparse

import torch

import bridges
from bridges.data.corpus import bundled_documents, encode_documents, pack_rows
from bridges.ops.kl import kl_divergence
from bridges.sparsity.moving import saliency
from bridges.sparsity.projection import supports
from bridges.sparsity.support import Support

SEQ_LEN, BATCH_ROWS = 128, 8
SHARES = (0.1, 0.2, 0.3, 0.5)


def rows_of(tokenizer, split, n_rows):
    documents = bundled_documents(split)[: 20 * n_rows]
    return pack_rows(encode_documents(tokenizer, documents), SEQ_LEN, tokenizer.bos_token_id)[:n_rows]


def kl_of(dense, sparse, support, ids):
    """Summed over tokens."""
    with torch.no_grad():
        target = dense(ids).logits.flatten(0, 1)
    with support.sparse_kernels():
        return kl_divergence(target, sparse(ids, use_cache=False).logits.flatten(0, 1))


def saliencies(dense, sparse, support, rows):
    """Of every nonzero, per tensor."""
    squared = [torch.zeros_like(values) for values in support.matrices()]
    for ids in rows.split(BATCH_ROWS):
        sparse.zero_grad(set_to_none=True)
        for values in support.parameters():
            values.grad = None
        (kl_of(dense, sparse, support, ids) / ids.numel()).backward()
        support.gather_gradients()
        for total, values in zip(squared, support.matrices(), strict=True):
            total += values.grad.square() / (len(rows) / BATCH_ROWS)
    return [saliency(values.detach(), one) for values, one in zip(support.matrices(), squared, strict=True)]


@torch.no_grad()
def kl_without(dense, sparse, support, ranked_by, share, rows):
    """Nats per token, with the lowest-ranked share of each tensor's nonzeros set to zero for the while."""
    before = [values.detach().clone() for values in support.matrices()]
    for values, rank in zip(support.matrices(), ranked_by, strict=True):
        values[rank.argsort()[: round(share * len(rank))]] = 0
    support.scatter()
    total = sum(kl_of(dense, sparse, support, ids) for ids in rows.split(BATCH_ROWS)) / rows.numel()
    for values, old in zip(support.matrices(), before, strict=True):
        values.copy_(old)
    support.scatter()
    return total.item()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=160, help="training rows that saliency is measured on")
    parser.add_argument("--heldout", type=int, default=64, help="held-out rows that the KL is measured on")
    args = parser.parse_args(arguments)
    dense, sparse, tokenizer = bridges.load_pair()
    support = Support(sparse, supports(sparse))
    train, heldout = rows_of(tokenizer, "train", args.rows), rows_of(tokenizer, "heldout", args.heldout)
    ranks = {
        "saliency": saliencies(dense, sparse, support, train),
        "magnitude": [values.detach().abs() for values in support.matrices()],
    }
    print("| share set to zero | KL, least saliency | KL, least magnitude |\n|---|---|---|")
    found = {}
    for share in (0.0, *SHARES):
        found[share] = {name: kl_without(dense, sparse, support, rank, share, heldout) for name, rank in ranks.items()}
        print(f"| {share:.0%} | {found[share]['saliency']:.3f} | {found[share]['magnitude']:.3f} |", flush=True)
    return found


if __name__ == "__main__":
    main()
