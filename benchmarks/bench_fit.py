"""The closed form, gradient steps, and both, at equal wall time on the bundled pair: python benchmarks/bench_fit.py

All three see the same rows and are measured on the same held-out rows. How fast each part is, is measured first.
"""

import argparse
import time

import bridges
from bridges.demo import HELDOUT_DOCUMENTS, SETTINGS, TRAIN_DOCUMENTS, demo_rows

PROBE_TOKENS, PROBE_STEPS = 100_000, 30


def timed(pair, train, heldout, **settings):
    """(seconds, report) of one fit."""
    started = time.perf_counter()
    config = SETTINGS.with_settings({"progress": False, **settings})
    report = bridges.fit(pair.dense, pair.sparse, train, eval_data=heldout, config=config).report
    return time.perf_counter() - started, report


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=90.0, help="wall time of each, without evaluation")
    seconds = parser.parse_args().seconds
    pair = bridges.load_pair()
    train = demo_rows(pair, "train", 2 * TRAIN_DOCUMENTS, SETTINGS.seq_len, SETTINGS.seed)
    heldout = demo_rows(pair, "heldout", HELDOUT_DOCUMENTS, SETTINGS.seq_len, SETTINGS.seed)
    timed(pair, train, heldout, steps=1)  # kernels compile, files are read
    rest, _ = timed(pair, train, heldout, steps=0, closed_form=False)
    tokens_took = timed(pair, train, heldout, steps=0, closed_form_tokens=PROBE_TOKENS)[0] - rest
    steps_took = timed(pair, train, heldout, steps=PROBE_STEPS, closed_form=False)[0] - rest
    if min(tokens_took, steps_took) <= 0:
        raise SystemExit("the machine is too busy to time a part; run this alone")
    per_token, per_step = tokens_took / PROBE_TOKENS, steps_took / PROBE_STEPS
    tokens = min(round(seconds / per_token), train.numel())
    few = min(SETTINGS.closed_form_tokens, tokens // 2)
    runs = {
        "closed form alone": dict(steps=0, closed_form_tokens=tokens),
        "gradient steps alone": dict(steps=round(seconds / per_step), closed_form=False),
        "both": dict(steps=round((seconds - few * per_token) / per_step), closed_form_tokens=few),
    }
    names = ("nmse_encode", "nmse_decode", "kl_dense_to_sparse", "kl_sparse_to_dense")
    print("| " + " | ".join(["", "steps", "closed-form tokens", "seconds", *names]) + " |")
    print("|" + "---|" * 8)
    for name, settings in runs.items():
        took, report = timed(pair, train, heldout, **settings)
        cells = [name, settings["steps"], settings.get("closed_form_tokens", 0), f"{took - rest:.0f}"]
        print("| " + " | ".join(map(str, [*cells, *(f"{report.mean[f]:.3f}" for f in names)])) + " |", flush=True)


if __name__ == "__main__":
    main()
