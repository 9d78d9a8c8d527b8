"""Steer a real chat model by the channels of a pruned copy of it: python examples/steer_smollm2.py

SmolLM2-135M-Instruct is the dense model. The sparse one is a copy whose attention and MLP matrices have the smaller
half of their weights set to zero. One site is bridged, by the closed form on the English of Python's documentation. The
edit adds to the sparse model's channels what they differ by between sentences about the sea and about a city.
"""

import argparse
import copy
from pydoc_data.topics import topics

import torch
from get_smollm2 import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

import bridges

SEA = (
    "The ocean is deep and blue, and ships sail over its waves.",
    "Whales, sharks and fish swim in the sea near the coral reef.",
    "A sailor looks at the tide from the beach, and the boat leaves the harbor.",
)
CITY = (
    "The office is large and grey, and people walk through its rooms.",
    "Cars, trucks and buses drive in the city near the main road.",
    "A teacher looks at the clock from the door, and the train leaves the station.",
)
QUESTIONS = ("What should I do this weekend?", "How do I make tea?", "Tell me a story about a cat.", "What is music?")
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--site", default="10.attn")
parser.add_argument("--channels", type=int, default=576, help="edit only so many, those that differ most")
parser.add_argument("--strength", type=float, default=3.0)
parser.add_argument("--rows", type=int, default=96, help="rows of 128 tokens to fit the bridge on")
args = parser.parse_args()

dense, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2()), AutoTokenizer.from_pretrained(smollm2())
sparse = copy.deepcopy(dense)
with torch.no_grad():
    for weight in (weight for weight in sparse.model.layers.parameters() if weight.ndim == 2):
        weight[weight.abs() <= weight.abs().median()] = 0

text = tokenizer("\n\n".join(topics.values()), return_tensors="pt").input_ids[0]
rows = text[: len(text) // 128 * 128].view(-1, 128)
settings = {"sites": (args.site,), "steps": 0, "closed_form_tokens": 128 * args.rows, "eval_tokens": 512}
bridge_set = bridges.fit(dense, sparse, rows[: args.rows], **settings, progress=False)
print(bridge_set.report)


@torch.no_grad()
def mean_read(sentences):
    """What the sparse model's sublayer reads, on average over the sentences' tokens from the third on."""
    chain = bridges.as_residual(sparse)
    reads = [chain.reads(tokenizer(one, return_tensors="pt").input_ids) for one in sentences]
    return torch.stack([read[chain.index(args.site)][0, 2:].mean(0) for read in reads]).mean(0)


def add(values):
    """Edits that add these values to the chosen channels."""
    return [bridges.Edit(args.site, int(c), float(v), mode="add") for c, v in zip(chosen, values, strict=True)]


difference = mean_read(SEA) - mean_read(CITY)
chosen = difference.abs().topk(args.channels).indices
edits = {"unsteered": [], "the sea": add(difference[chosen])}
noise = torch.randn(len(chosen), generator=torch.Generator().manual_seed(0))
lengths = [bridges.directions(bridge_set, one)[args.site].norm().item() for one in (edits["the sea"], add(noise))]
edits["a random direction of that norm"] = add(noise * lengths[0] / lengths[1])

tokenizer.padding_side = "left"
chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
inputs = tokenizer.apply_chat_template(chats, **options)
for name, edit in edits.items():
    with bridges.steer(dense, bridge_set, edit, strength=args.strength, at="residual"), torch.no_grad():
        answers = dense.generate(**inputs, max_new_tokens=40, do_sample=False)[:, inputs.input_ids.shape[1] :]
        log_p = dense(rows[-8:]).logits.log_softmax(-1)  # of text that the bridge was not fitted on
    before = log_p if not edit else before
    print(f"\n{name}: KL on other text {(before.exp() * (before - log_p)).sum(-1).mean():.2f} nats per token")
    for question, answer in zip(QUESTIONS, tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True):
        print(f"  {question} {' '.join(answer.split())}")
