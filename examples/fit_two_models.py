"""Bridges between two Hugging Face models: python examples/fit_two_models.py DENSE SPARSE [--out DIR]

DENSE and SPARSE are folders or hub ids of models that share a tokenizer; without them two tiny random models are used.
"""

import argparse

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import bridges

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("models", nargs="*", help="the dense and the sparse model")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--out", default=None, help="the run folder; default: nothing is written")
args = parser.parse_args()

if args.models:
    dense, sparse = args.models
else:
    torch.manual_seed(0)
    ends = dict(bos_token_id=0, eos_token_id=0)
    dense = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, **ends))
    sparse = bridges.SparseTransformer(
        bridges.SparseConfig(vocab_size=61, d_model=64, n_layer=3, d_head=16, block_size=64, **ends)
    )

# No data: sequences are sampled from the dense model. A LongTensor, a DataLoader or a folder of text files works too.
bridge_set = bridges.fit(dense, sparse, steps=args.steps, seq_len=32, sampled_rows=256, output_dir=args.out)
print(bridge_set.report)

bridge = bridge_set["0.mlp"]
print("channel 0 of the sparse model in the dense stream, first 4 entries:", bridge.decoder_weight[:4, 0].tolist())
