"""What a fit between large models needs, worked out from their shapes, not run: python benchmarks/scale_plan.py

An 8 B dense model (32 layers, width 4,096, vocabulary 128,256, bf16) and a frozen sparse one of 0.4 B weights (8
layers, width 2,048, MLP 8,192, bf16), 17 sites, two of them in every step. Change the constants for other models.
"""

DENSE = {"layers": 32, "width": 4096, "body": 6.98e9}
SPARSE = {"layers": 8, "width": 2048, "body": 8 * (4 * 2048**2 + 2 * 2048 * 8192)}
VOCABULARY, SITES, SITES_PER_STEP = 128_256, 17, 2
ROWS, ROW_TOKENS = 4, 1024
"""Of one micro-batch on one GPU."""
MICRO_BATCHES = 2
GPU_FLOPS, SHARE_OF_PEAK = 989e12, 0.4
"""H100, bf16, dense products; the share that training at this size usually reaches."""
NVLINK, NETWORK = 400e9, 50e9
"""Bytes per second: of a GPU inside a node, and of a node between nodes."""
GPUS_PER_NODE = 8
STATE_COPIES = 7
"""Plain and standardised maps, both gradients, two moments, the best state."""
CHUNK_LOGITS = 2**27
"""Logits of a hybrid pass that exist at a time (bridges/objective/head.py)."""
SAVED_BYTES = 34
"""Per token, channel and layer that autograd keeps of a decoder layer in bf16 with fused attention (Korthikanti et al.
2022, without dropout and attention weights)."""


def parameters(model):
    """Body, and one matrix of the embedding's shape."""
    return model["body"], VOCABULARY * model["width"]


def bridge_parameters():
    """Encoders and decoders of all sites."""
    return SITES * 2 * DENSE["width"] * SPARSE["width"]


def flop_per_token():
    """Multiplications and additions: 2 a weight forward, 2 for the gradient of the input, 2 for that of the weight."""
    (dense, head_dense), (sparse, head_sparse) = parameters(DENSE), parameters(SPARSE)
    forward = 2 * (dense + head_dense + sparse + head_sparse)
    tails = 4 * (dense / 2 + head_dense + sparse / 2 + head_sparse)  # half of a model on average
    forward *= 2 if MICRO_BATCHES > 1 else 1  # several micro-batches run twice: what they are divided by comes first
    return forward + 6 * bridge_parameters() + SITES_PER_STEP * tails


def memory():
    """{part: GB} on one GPU, at the worst site: the first, whose dense tail is the whole model."""
    tokens = ROWS * ROW_TOKENS
    (dense, head_dense), (sparse, head_sparse) = parameters(DENSE), parameters(SPARSE)
    sites_dense = 2 * DENSE["layers"] + 1
    return {
        "dense model": 2 * (dense + 2 * head_dense) / 1e9,
        "sparse model": 2 * (sparse + 2 * head_sparse) / 1e9,
        "bridges, gradients, optimiser": 4 * STATE_COPIES * bridge_parameters() / 1e9,
        "streams of both models": 2 * tokens * (sites_dense * DENSE["width"] + SITES * SPARSE["width"]) / 1e9,
        "logits: target; part of a hybrid pass": 2 * (tokens * VOCABULARY + 2 * CHUNK_LOGITS) / 1e9,
        "graph of the dense tail": SAVED_BYTES * tokens * DENSE["layers"] * DENSE["width"] / 1e9,
    }


def step_seconds(gpus):
    """{part: seconds} of one step."""
    tokens = MICRO_BATCHES * ROWS * ROW_TOKENS
    traffic = 2 * 4 * bridge_parameters()  # a ring sends every gradient about twice
    nodes = -(-gpus // GPUS_PER_NODE)
    return {
        "computation": tokens * flop_per_token() / (GPU_FLOPS * SHARE_OF_PEAK),
        "gradients between GPUs": traffic / NVLINK + (traffic / NETWORK if nodes > 1 else 0),
    }


def main():
    print(f"bridges: {bridge_parameters() / 1e6:.0f} M weights; {flop_per_token() / 1e9:.0f} GFLOP a token\n")
    parts = memory()
    print("| on one GPU | GB |\n|---|---|")
    for name, gigabytes in [*parts.items(), ("sum", sum(parts.values()))]:
        print(f"| {name} | {gigabytes:.1f} |")
    columns = ["GPUs", "tokens a step", "s: computation", "s: gradients", "tokens/s", "hours for 1 B tokens"]
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for gpus in (8, 64):
        seconds, tokens = step_seconds(gpus), gpus * MICRO_BATCHES * ROWS * ROW_TOKENS
        rate = tokens / sum(seconds.values())
        cells = [f"{gpus}", f"{tokens:,}", *(f"{value:.3f}" for value in seconds.values())]
        print(f"| {' | '.join([*cells, f'{rate:,.0f}', f'{1e9 / rate / 3600:.1f}'])} |")


if __name__ == "__main__":
    main()
