"""Train the bundled sparse model jointly with bridges: python examples/train_sparse.py --run runs/pair

Ctrl-C (or `timeout -s INT 1h python ...`) stops it with a checkpoint; the same command continues from there.
"""

import argparse
import tomllib
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel

import bridges
from bridges.data.corpus import bundled_corpus

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--config", default="configs/bundled_pair_1_dense.toml", help="the tables [sparse] and [fit]")
parser.add_argument("--run", default="runs/pair", help="the run folder; sparse/ in it is the trained model")
parser.add_argument("--dense", default="bridges/assets/dense", help="the dense model's folder")
parser.add_argument("--tokenizer", default="bridges/assets/tokenizer", help="its tokenizer's folder")
parser.add_argument(
    "--start",
    help="what to start from: a sparse model's folder, or sparse.safetensors of a checkpoint; default: random",
)
parser.add_argument("--split", default="train", help='"heldout" is a twentieth of the text, for a quick try')
parser.add_argument("--rows", type=int, default=0, help="train on this many rows only; 0: on all")
parser.add_argument("--report-to", default="none", help="none or wandb")
args, settings = parser.parse_known_args()
# All other arguments are settings of fit: --steps 100
names = [name.removeprefix("--").replace("-", "_") for name in settings[::2]]
overrides = dict(zip(names, settings[1::2], strict=True))

tables = tomllib.loads(Path(args.config).read_text())
config = bridges.FitConfig.from_file(args.config).with_settings(overrides)
tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
dense = GPT2LMHeadModel.from_pretrained(args.dense)
torch.manual_seed(config.seed)
if args.start and Path(args.start).is_dir():
    sparse = bridges.SparseTransformer.from_pretrained(args.start)
else:
    sparse = bridges.SparseTransformer(
        bridges.SparseConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **tables["sparse"])
    )
    if args.start:
        sparse.load_state_dict(load_file(args.start))
rows = bundled_corpus(tokenizer, config.seq_len or 128, args.split, config.seed)
heldout = bundled_corpus(tokenizer, config.seq_len or 128, "heldout", config.seed)
bridge_set = bridges.fit(
    dense,
    sparse,
    rows[: args.rows or None],
    eval_data=heldout[:256],
    config=config,
    output_dir=args.run,
    resume=True,
    report_to=args.report_to,
)
print(bridge_set.report)
