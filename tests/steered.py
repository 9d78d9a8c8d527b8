"""Pairs to steer, edits of every kind, and the formula of method section 4 written out site by site."""

from itertools import product

import pytest
import torch
from pairs import CONTEXT, VOCAB, gpt2, scrambled, sparse_model
from transformers import LlamaConfig, LlamaForCausalLM

from bridges.models.huggingface.recording import model_inputs
from bridges.steering.delta import stream_to_read
from bridges.steering.edits import Edit
from bridges.steering.steer import steer

SITE, CHANNEL = "1.attn", 0

LEFT = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1], [1] * 7])


def llama():
    torch.manual_seed(4)
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    limits = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": None}
    return scrambled(LlamaForCausalLM(LlamaConfig(**shape, **limits)))


def gpt2_without_eos():
    model = gpt2()
    model.generation_config.eos_token_id = None
    return model


DENSE = {"gpt2": gpt2_without_eos, "llama": llama}

SPARSE = {"rms": lambda: sparse_model(), "layernorm": lambda: sparse_model(rms_norm=False)}


def slow_but(cases, *fast):
    """The cases as parameters, those that are not named marked slow: the grids below are wide."""
    marks = {name: () if name in fast else (pytest.mark.slow,) for name in cases}
    return [pytest.param(case, id=name, marks=marks[name]) for name, case in cases.items()]


def in_turn(first, second, third):
    """Each of the first with each of the second, and one of the third in turn: any two values meet in some case."""
    return [(a, b, third[(i + j) % len(third)]) for (i, a), (j, b) in product(enumerate(first), enumerate(second))]


def steered(pair, edits, **options):
    options.setdefault("sparse", pair.sparse.model)
    return steer(pair.dense.model, pair.bridge_set, edits, **options)


def logits(pair, ids, mask=None):
    with torch.no_grad():
        return pair.dense.model(**model_inputs(pair.dense.model, ids, mask)).logits


def written_out(pair, edits, ids, mask, strength, at, source, gains=None):
    """Logits of the dense model with the edits, one site after another, from method section 4 alone."""
    with torch.no_grad():
        chain, trace = pair.dense, pair.dense.trace(ids, mask)
        sparse_reads = pair.sparse.reads(ids, mask)
        stream, context = trace.residuals[0], trace.context
        for j in range(len(chain.sites)):
            addend_stream = torch.zeros_like(stream)
            addend_read = torch.zeros_like(stream)
            for i, bridge in enumerate(pair.bridge_set):
                if pair.site("dense", i) != j:
                    continue
                gain_s = pair.sparse.norm(pair.site("sparse", i)).gain
                z = bridge.encode(trace.residuals[j])
                for c in {e.channel for e in edits if e.site == pair.bridge_set.sites[i]}:
                    if source == "sparse":
                        v = sparse_reads[pair.site("sparse", i)][..., c]
                    else:
                        v = gain_s[c] * z[..., c] / bridge.rms_sparse
                    new = v.clone()
                    for e in edits:
                        if (e.site, e.channel) == (pair.bridge_set.sites[i], c):
                            new = {"set": new * 0 + e.value, "add": new + e.value, "scale": new * e.value}[e.mode]
                    dz = strength * (new - v) * bridge.rms_sparse / gain_s[c]
                    delta = dz[..., None] * bridge.decoder_weight[:, c]
                    if at == "residual":
                        addend_stream += delta
                    else:
                        addend_read += stream_to_read(chain.norm(j), bridge.rms_dense, delta)
            stream = stream + addend_stream
            with chain.hook_reads({j: lambda read, addend=addend_read: read + addend}):
                last = j == len(chain.sites) - 1
                stream = chain.head(stream, context) if last else chain.sublayer(j, stream, context)
        return stream


EDITS = {
    "set": [Edit(SITE, CHANNEL, 0.7)],
    "add": [Edit(SITE, CHANNEL, 0.7, "add")],
    "scale": [Edit(SITE, CHANNEL, -1.5, "scale")],
    "in order": [Edit(SITE, CHANNEL, 0.7), Edit(SITE, CHANNEL, 3.0, "scale"), Edit(SITE, CHANNEL, 0.1, "add")],
    "several": [
        Edit("0.mlp", 2, 0.3, "add"),
        Edit(SITE, CHANNEL, 0.7),
        Edit(SITE, 1, -2.0, "scale"),
        Edit("final", 4, 0.5),
        Edit("1.mlp", 3, 0.4, "scale"),
    ],
}
