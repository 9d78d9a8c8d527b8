"""Edit channels of the sparse model and watch the dense model's answer change:
python examples/steer_by_counterfactual.py BRIDGES

Each channel gets, token by token, the reading that it has on another prompt, here one with the other quote.
"""

import argparse

import torch

import bridges

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("bridges", help="a bridge folder for the bundled pair, as `bridges demo` writes it")
parser.add_argument("--prompt", default="print('hello world")
parser.add_argument("--other", default='print("hello world', help="a prompt of equally many tokens with another cue")
parser.add_argument("--answers", nargs=2, default=("')", '")'), help="what should follow each prompt")
args = parser.parse_args()

dense, sparse, tokenizer = bridges.load_pair()
bridge_set = bridges.BridgeSet.from_pretrained(args.bridges)
found = bridges.find_channels(dense, sparse, bridge_set, "single_double_quote", most=4, tokenizer=tokenizer)
site, channels, at = found.best
print(f"channels {list(channels)} at {site}, entering at the {at}")

ids, other = (torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text)]]) for text in (args.prompt, args.other))
edits = [bridges.counterfactual(sparse, site, channel, ids, other) for channel in channels]
answers = [tokenizer.encode(answer)[0] for answer in args.answers]
for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
    with bridges.steer(dense, bridge_set, edits, strength=strength, at=at), torch.no_grad():
        p = dense(ids).logits[0, -1].softmax(-1)
    shown = ", ".join(f"P({text}) = {p[i]:.3f}" for text, i in zip(args.answers, answers, strict=True))
    print(f"strength {strength:.2f}: {shown}")
