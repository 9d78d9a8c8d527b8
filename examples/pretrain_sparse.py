"""Train a sparse model by itself, with the bundled dense one as teacher: python examples/pretrain_sparse.py

Where the config has a table [sparse], a new model of that shape is trained; else one that is there already, with the
AbsTopK of the table [nodes] if there is one. Ctrl-C (or
`timeout -s INT 1h python ...`) stops it with a checkpoint; the same command continues from there.
"""

import argparse

import torch
from transformers import GPT2LMHeadModel

import bridges
from bridges.data.corpus import bundled_corpus
from bridges.io.files import read_toml
from bridges.sparsity.widening import widen

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--config", default="configs/bundled_pair_6_readable.toml", help="[pretrain], [sparse], [nodes]")
parser.add_argument("--start", default="", help="the sparse model's folder to start from; default: the bundled one")
parser.add_argument("--widen", type=int, default=1, help="make it so many times as wide first, with the same logits")
parser.add_argument("--dense", default="bridges/assets/dense", help="the teacher's folder")
parser.add_argument("--run", default="runs/readable", help="the run folder; sparse/ in it is the trained model")
parser.add_argument("--split", default="train", help='"heldout" is a twentieth of the text, for a quick try')
parser.add_argument("--report-to", default="none", help="none or wandb")
args, settings = parser.parse_known_args()
# All other arguments are settings of pretrain: --steps 100
names = [name.removeprefix("--").replace("-", "_") for name in settings[::2]]
overrides = dict(zip(names, settings[1::2], strict=True))

config = bridges.PretrainConfig.from_file(args.config).with_settings(overrides)
_, sparse, tokenizer = bridges.load_pair()
dense = GPT2LMHeadModel.from_pretrained(args.dense)
shape = read_toml(args.config).get("sparse")
if shape is not None:
    torch.manual_seed(config.seed)
    shape_of_new = bridges.SparseConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **shape)
    sparse = bridges.SparseTransformer(shape_of_new)
elif args.start:
    sparse = bridges.SparseTransformer.from_pretrained(args.start)
if args.widen > 1:
    sparse = widen(sparse, args.widen)
nodes = read_toml(args.config).get("nodes")
if nodes is not None:
    weights = sparse.state_dict()
    sparse = bridges.SparseTransformer(bridges.SparseConfig.from_dict({**sparse.config.to_dict(), **nodes}))
    sparse.load_state_dict(weights)
rows = bundled_corpus(tokenizer, config.seq_len or 128, args.split, config.seed)
heldout = bundled_corpus(tokenizer, config.seq_len or 128, "heldout", config.seed)
bridges.pretrain(
    sparse,
    rows,
    teacher=dense,
    tokenizer=tokenizer,
    eval_data=heldout,
    config=config,
    output_dir=args.run,
    resume=True,
    report_to=args.report_to,
)
