"""Which channel of the sparse model decides a task? python examples/find_the_channel.py BRIDGES --task for_while

Prints the predicted effect of each channel (one backward pass) and what its edit did, measures the best set on other
prompts with its baselines, and saves the edit as a fixed direction.
"""

import argparse

import bridges

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("bridges", help="a bridge folder for the bundled pair, as `bridges demo` writes it")
parser.add_argument("--task", default="single_double_quote", choices=bridges.TASKS)
parser.add_argument("--most", type=int, default=4, help="channels that may be edited together")
parser.add_argument("--by", default="dense", choices=("dense", "both"), help="whose answer they are chosen by")
parser.add_argument("--prompts", type=int, default=100)
parser.add_argument("--save", default=None, help="write the edit as PATH.json, and as a direction to PATH.safetensors")
args = parser.parse_args()

dense, sparse, tokenizer = bridges.load_pair()
bridge_set = bridges.BridgeSet.from_pretrained(args.bridges)
found = bridges.find_channels(dense, sparse, bridge_set, args.task, most=args.most, by=args.by, tokenizer=tokenizer)
print(f"{'site':<8}{'channel':>8}  {'enters at':<10}{'predicted':>10}{'effect':>10}{'P(target)':>11}")
for one in found.ranking[:10]:
    print(f"{one.site:<8}{one.channel:>8}  {one.at:<10}{one.predicted:>10.2f}{one.effect:>10.2f}{one.p_target:>11.3f}")
print(f"rank correlation of prediction and effect: {found.agreement:.2f}")
print(bridges.sweep(dense, sparse, bridge_set, args.task, found.best, n=args.prompts, tokenizer=tokenizer))

if args.save:
    edits = bridges.constant_edits(dense, sparse, bridge_set, found.best, args.task, tokenizer=tokenizer)
    bridges.save_edits(edits, f"{args.save}.json")
    bridges.export_direction(dense, bridge_set, edits, f"{args.save}.safetensors")
