"""One thread, no network, no reporting; and the tiny random models that tests of several packages share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Two workers of two threads each on two cores wait for each other more than they work; programs that tests start, too.
os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"

import checked_once
import jaxtyping
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, logging

checked_once.install()  # before the package is imported
torch.set_num_threads(1)
logging.set_verbosity_error()  # made-up configurations draw warnings about token ids and rotary factors

VOCAB = 61
_IDS = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_MODERN = _IDS | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GPT = _IDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
# Families whose settings have other names, or need more than the common ones.
_OWN = {
    "gpt2": _GPT,
    "gptj": _GPT | {"rotary_dim": 4},
    "gpt_bigcode": _GPT,
    "bloom": _IDS | {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": _IDS | {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "mamba": _IDS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "opt": _IDS
    | {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "ffn_dim": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
    },
    "gemma2": _MODERN | {"head_dim": 8},
    "qwen3": _MODERN | {"head_dim": 8},
    "exaone4": _MODERN | {"head_dim": 8},
    "mixtral": _MODERN | {"num_local_experts": 4},
    "qwen3_moe": _MODERN | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8},
    "gpt_oss": _MODERN | {"num_local_experts": 4, "head_dim": 8},
    "lfm2": _MODERN | {"layer_types": ["conv", "full_attention"]},
}


def build_tiny(family="gpt2", seed=0, **settings):
    """A random causal LM of a family, in evaluation mode; norm weights and biases are random too, so they count."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **(_OWN.get(family, _MODERN) | settings))
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.normal_(1, 0.2)
    return model


def pytest_collection_modifyitems(items):
    """The longest first, so that no worker waits for the other at the end: `slow(60)` takes a minute or so."""
    items.sort(key=lambda item: -max((sum(mark.args) for mark in item.iter_markers("slow")), default=0))


@pytest.fixture(scope="session")
def tiny():
    """`tiny(family, seed=0, **settings)` builds a random two-layer model of width 32 over 61 tokens."""
    return build_tiny


@pytest.fixture
def tokens():
    """Three rows of nine tokens."""
    return torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def padding():
    """Their mask: one row padded on the left, one on the right, one whole."""
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    mask[1, -3:] = 0
    return mask


@pytest.fixture
def unchecked():
    """What users run: no check of types speaks before the library's own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def pair():
    """GPT-2 and a sparse model with random bridges, in float64."""
    from pairs import gpt2, join, sparse_model, with_units  # after the hook that checks types: it imports the package

    return with_units(join(gpt2(), sparse_model()))


@pytest.fixture(scope="module")
def prompts(pair):
    """Six pairs of a made-up task."""
    from pairs import toy_task

    from bridges.channels.runs import Prompts

    return Prompts(pair, toy_task())


@pytest.fixture
def quick_sweeps(monkeypatch):
    """Channels chosen on 16 pairs, four random directions, two pairs of three other tasks.

    For tests that ask whether a sweep reaches a file or a page; its figures are asked for on tiny models.
    """
    from bridges import demo
    from bridges.channels import curves, measured_edits, one_and_few, side_effects, sweep
    from bridges.views import report

    for module in (demo, one_and_few, report, sweep):
        monkeypatch.setattr(module, "CHOSEN_ON", 16)
    for module in (demo, report, sweep):
        monkeypatch.setattr(module, "other_tasks", lambda *given: side_effects.other_tasks(*given)[:3])
    monkeypatch.setattr(curves, "RANDOM_DIRECTIONS", 4)
    monkeypatch.setattr(measured_edits, "SEARCH_DIRECTIONS", 2)
    monkeypatch.setattr(side_effects, "PAIRS_PER_OTHER_TASK", 2)


@pytest.fixture
def cuda_generators(monkeypatch):
    """The generator states of two CUDA devices that are made up: device index to state, changed by `manual_seed`."""
    from accelerate.state import PartialState

    PartialState()  # accelerate keeps the device that it finds first, which must not be one that is made up
    states = {device: torch.full((2,), 10 + device) for device in range(2)}

    def seed_all(seed):
        states.update({device: torch.full((2,), seed) for device in states})

    def set_state(state, device):
        states[device] = state

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(states))
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seed_all)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", set_state)
    return states
