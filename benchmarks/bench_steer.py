"""What an edit costs: forward and generate with and without it, in turns: python benchmarks/bench_steer.py

A dense GPT-2 of 4 layers and width 256 and a sparse model of width 2048, both random: the cost does not depend on the
weights.
"""

from contextlib import nullcontext
from statistics import median

import torch
from timing import header, medians
from transformers import GPT2Config, GPT2LMHeadModel

import bridges

FROM_SPARSE = "from the sparse model"
VOCAB, NEW_TOKENS = 1024, 32
ROUNDS, SLOW_ROUNDS = 40, 3  # with the sparse model a round takes twenty times as long, and its change is large


def models():
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": None}
    dense = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=256, n_layer=4, n_head=8, n_positions=256, **ends)
    ).eval()
    sparse = bridges.SparseTransformer(
        bridges.SparseConfig(vocab_size=VOCAB, d_model=2048, d_mlp=2048, n_layer=4, n_head=16, block_size=256, **ends)
    ).eval()
    rows = torch.randint(VOCAB, (12, 64))
    return dense, sparse, bridges.fit(dense, sparse, rows, steps=0, closed_form_tokens=500, progress=False)


def main() -> None:
    dense, sparse, bridge_set = models()
    chain = bridges.as_residual(dense)
    add, scale = bridges.Edit("2.attn", 7, 0.5, "add"), bridges.Edit("2.attn", 7, 2.0, "scale")

    def steered(edit, **options):
        return lambda: bridges.steer(chain, bridge_set, edit, check_models=False, **options)

    contexts = {
        "without": nullcontext,
        "fixed edit": steered(add),
        "from the encoder": steered(scale, source="encoder"),
        FROM_SPARSE: steered(scale, sparse=sparse),
    }
    print(f"{torch.get_num_threads()} threads, float32")
    print(header("ms (change against without)", list(contexts)))
    for batch in (1, 8):
        ids = torch.randint(VOCAB, (batch, 128))
        options = {
            "max_new_tokens": NEW_TOKENS,
            "do_sample": False,
            "pad_token_id": 0,
            "attention_mask": torch.ones_like(ids),
        }
        works = {
            f"forward, batch {batch} x 128": lambda ids=ids: dense(ids, use_cache=False),
            f"generate {NEW_TOKENS} tokens, batch {batch}": lambda ids=ids, o=options: dense.generate(ids, **o),
        }
        for label, work in works.items():

            def timed(context, work=work):
                def run():
                    with torch.no_grad():
                        work()

                return context, run

            slow = [
                rounds_inside({name: timed(context) for name, context in contexts.items()}) for _ in range(SLOW_ROUNDS)
            ]
            quick = {name: timed(context) for name, context in contexts.items() if name != FROM_SPARSE}
            rounds = [rounds_inside(quick) for _ in range(ROUNDS)]
            print(
                f"| {label} | "
                + " | ".join(cell(name, slow if name == FROM_SPARSE else rounds) for name in contexts)
                + " |"
            )


def rounds_inside(candidates):
    """Milliseconds of the work alone: entering the context takes the model apart once, and is not counted."""
    milliseconds = {}
    for name, (context, run) in candidates.items():
        with context():
            milliseconds[name] = medians({"run": run}, rounds=3)["run"]
    return milliseconds


def cell(name, rounds):
    """The median, and the median and middle half of the change against no edit in the same round."""
    change = sorted(100 * (one[name] / one["without"] - 1) for one in rounds)
    quarter = len(change) // 4
    spread = f" ({median(change):+.0f} %, {change[quarter]:+.0f} to {change[-1 - quarter]:+.0f})"
    return f"{median(one[name] for one in rounds):.2f}" + (spread if name != "without" else "")


if __name__ == "__main__":
    main()
