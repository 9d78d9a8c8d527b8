"""Generate with one channel scaled, read from the sparse model or from the dense model's own stream:
python examples/steer_in_generation.py BRIDGES

Inside the context `generate` is the ordinary one: cache, sampling, beams and padding work as usual.
"""

import argparse

import torch

import bridges

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("bridges", help="a bridge folder for the bundled pair, as `bridges demo` writes it")
parser.add_argument("--prompt", default="def get(name):\n    return ")
parser.add_argument("--site", default="1.attn")
parser.add_argument("--channel", type=int, default=None, help="default: the one that varies most on the prompt")
parser.add_argument("--factor", type=float, default=-2.0, help="what the channel's reading is multiplied by")
parser.add_argument("--tokens", type=int, default=16)
args = parser.parse_args()

dense, sparse, tokenizer = bridges.load_pair()
bridge_set = bridges.BridgeSet.from_pretrained(args.bridges)
ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(args.prompt)]])
with torch.no_grad():
    residual_model = bridges.as_residual(sparse)
    read = residual_model.reads(ids)[residual_model.index(args.site)][0]
channel = int(read.var(0).argmax()) if args.channel is None else args.channel
edit = bridges.Edit(args.site, channel, args.factor, mode="scale")
options = {"max_new_tokens": args.tokens, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
print("unedited:", repr(tokenizer.decode(dense.generate(ids, **options)[0, 1:])))
for source in ("sparse", "encoder"):
    with bridges.steer(dense, bridge_set, edit, sparse=sparse, source=source, at="residual"):
        text = tokenizer.decode(dense.generate(ids, **options)[0, 1:])
    print(f"channel {channel} at {args.site} times {args.factor:g}, read from the {source}:", repr(text))
