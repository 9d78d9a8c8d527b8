"""What a fit between large models needs, worked out from their shapes, not run: python benchmarks/scale_plan.py

docs/scale.md shows what it prints; a test holds the two together.

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
MOMENTS_BYTES = 4 * 2**30
"""`moments_gib` of `FitConfig`: the moments of the closed form that exist at a time."""
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


def memory(rows=ROWS):
    """{part: GB} on one GPU in a step, at the worst site: the first, whose dense tail is the whole model."""
    tokens = rows * ROW_TOKENS
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


def moments_per_site():
    """Bytes in float64: of a site's usual tokens, of massive ones, and of rows that judge the solution."""
    dense, sparse = DENSE["width"], SPARSE["width"]
    return 3 * 8 * (dense**2 + sparse**2 + dense * sparse)


def solved_together():
    """Sites that the closed form solves in one pass over its tokens."""
    return min(SITES, max(1, int(MOMENTS_BYTES // moments_per_site())))


def gradient_bytes():
    """Of all bridges, in float32."""
    return 4 * bridge_parameters()


def step_seconds(gpus):
    """{part: seconds} of one step."""
    tokens = MICRO_BATCHES * ROWS * ROW_TOKENS
    traffic = 2 * gradient_bytes()  # a ring sends every gradient about twice
    nodes = -(-gpus // GPUS_PER_NODE)
    return {
        "computation": tokens * flop_per_token() / (GPU_FLOPS * SHARE_OF_PEAK),
        "gradients between GPUs": traffic / NVLINK + (traffic / NETWORK if nodes > 1 else 0),
    }


def print_assumptions():
    (dense, head_dense), (sparse, _) = parameters(DENSE), parameters(SPARSE)
    print(f"dense: {(dense + 2 * head_dense) / 1e9:.1f} B weights, {shape(DENSE)}, bf16")
    print(f"sparse: {sparse / 1e9:.1f} B weights without its embeddings, {shape(SPARSE)}, frozen, bf16")
    print(f"vocabulary: {VOCABULARY:,}; sites: {SITES}, {SITES_PER_STEP} of them sampled in every step")
    print(f"a step on one GPU: {MICRO_BATCHES} micro-batches of {ROWS} rows of {ROW_TOKENS:,} tokens")
    print(f"GPU: {GPU_FLOPS / 1e12:.0f} TFLOP/s at {SHARE_OF_PEAK:.0%}; {NVLINK / 1e9:.0f} GB/s in a node of ", end="")
    print(f"{GPUS_PER_NODE}, {NETWORK / 1e9:.0f} GB/s between nodes")
    print(f"bridges: {bridge_parameters() / 1e6:.0f} M weights, float32; gradients {gradient_bytes() / 1e9:.1f} GB")
    print(f"computation: {flop_per_token() / 1e9:.0f} GFLOP a token\n")


def shape(model):
    """Depth and width in words."""
    return f"{model['layers']} layers of width {model['width']:,}"


def print_memory():
    together = solved_together()
    rows = [
        *memory().items(),
        ("sum", sum(memory().values())),
        (f"sum with micro-batches of {2 * ROWS} rows", sum(memory(2 * ROWS).values())),
        (f"before the steps: moments of {together} sites at a time", together * moments_per_site() / 1e9),
    ]
    print("| on one GPU | GB |\n|---|---|")
    for name, gigabytes in rows:
        print(f"| {name} | {gigabytes:.1f} |")
    print(f"\nThe closed form solves the {SITES} sites in {-(-SITES // together)} passes over its tokens.")


def print_steps():
    columns = ["GPUs", "tokens a step", "s: computation", "s: gradients", "gradients' share", "tokens/s"]
    columns.append("hours for 1 B tokens")
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for gpus in (GPUS_PER_NODE, 8 * GPUS_PER_NODE):
        seconds, tokens = step_seconds(gpus), gpus * MICRO_BATCHES * ROWS * ROW_TOKENS
        whole = sum(seconds.values())
        rate, share = tokens / whole, seconds["gradients between GPUs"] / whole
        cells = [f"{gpus}", f"{tokens:,}", *(f"{value:.3f}" for value in seconds.values()), f"{share:.1%}"]
        print(f"| {' | '.join([*cells, f'{rate:,.0f}', f'{1e9 / rate / 3600:.1f}'])} |")


def main():
    print_assumptions()
    print_memory()
    print_steps()


if __name__ == "__main__":
    main()
