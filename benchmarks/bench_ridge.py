"""What the closed form's ridge does after the demo's polish: python benchmarks/bench_ridge.py [1e-4 1e-3 1e-2]

Per ridge the losses on rows of the training split that are not fitted on, and P(target) of the single channel that does
most on the 64 pairs of single_double_quote that channels are chosen on, and that of random directions of its norm. No
held-out rows are used, so a setting may be chosen by it.
"""

import argparse

import bridges
from bridges.channels.find import CHOSEN_ON, find
from bridges.channels.prompts import frozen_pair
from bridges.channels.runs import Prompts, p_target_under_random
from bridges.data.corpus import bundled_documents, encode_documents, pack_rows
from bridges.demo import SETTINGS, TASK, TEXT_ROWS, TRAIN_DOCUMENTS, demo_rows
from bridges.tasks.pairs import task_pairs

DIRECTIONS = 60
EVALUATED_DOCUMENTS = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ridges", nargs="*", type=float, default=[1e-4, 1e-3, 1e-2])
    ridges = parser.parse_args().ridges
    pair = bridges.load_pair()
    seq_len, seed = SETTINGS.seq_len or 128, SETTINGS.seed
    train = demo_rows(pair, "train", TRAIN_DOCUMENTS, seq_len, seed)
    documents = bundled_documents("train", seed)[TRAIN_DOCUMENTS:][:EVALUATED_DOCUMENTS]
    rows = pack_rows(encode_documents(pair.tokenizer, documents), seq_len, pair.tokenizer.bos_token_id)
    pairs = task_pairs(TASK, pair.tokenizer, CHOSEN_ON)
    print("| ridge | nmse_decode | kl_dense_to_sparse | kl_sparse_to_dense | channel | P(target) | random directions |")
    print(f"|{'---|' * 7}", flush=True)
    for ridge in ridges:
        config = SETTINGS.with_settings({"ridge": ridge, "progress": False})
        bridge_set = bridges.fit(pair.dense, pair.sparse, train, eval_data=rows, config=config)
        assert bridge_set.report is not None, "fit always reports"
        mean = bridge_set.report.to_dict()["mean"]
        with frozen_pair(pair.dense, pair.sparse, bridge_set, check_models=False) as models:
            prompts = Prompts(models, pairs)
            found = find(models, prompts, train[:TEXT_ROWS])
            random = p_target_under_random(models, prompts, found.best, DIRECTIONS, seed=2)
        losses = " | ".join(f"{mean[name]:.3f}" for name in ("nmse_decode", "kl_dense_to_sparse", "kl_sparse_to_dense"))
        channel = f"{found.best.channels[0]} at {found.best.site}, {found.best.at}"
        p, control = found.sets[-1].p_target, random.mean().item()
        print(f"| {ridge:g} | {losses} | {channel} | {p:.3f} | {control:.3f} |", flush=True)


if __name__ == "__main__":
    main()
