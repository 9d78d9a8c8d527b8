"""A small PageData made by hand: every kind of content once, figures that are easy to tell apart."""

import copy
import random
from typing import Any

SITE = {
    "dense_site": "0.mlp",
    "d_dense": 8,
    "d_sparse": 32,
    "k": 16,
    "nmse_encode": 0.311,
    "nmse_encode_floor": 0.021,
    "nmse_decode": 0.122,
    "nmse_decode_shuffled": 1.933,
    "kl_dense_to_sparse": 0.244,
    "kl_dense_to_sparse_mean_ablation": 5.255,
    "kl_sparse_to_dense": 0.366,
    "kl_sparse_to_dense_mean_ablation": 5.477,
    "ce_recovered_dense_to_sparse": 0.911,
    "ce_recovered_sparse_to_dense": 0.922,
    "massive_share": 0.0,
    "kl_dense_to_sparse_se": 0.013,
    "kl_sparse_to_dense_se": None,
}
SITES = [
    SITE | {"name": "0.mlp"},
    SITE | {"name": "final", "dense_site": "final", "nmse_encode": 0.533, "kl_dense_to_sparse": 0.101},
]
MEAN = {name: value for name, value in SITE.items() if name not in ("dense_site", "d_dense", "d_sparse", "k")}

CURVES = {
    "p_target": [0.012, 0.345, 0.876],
    "p_target_sparse_model": [0.021, 0.432, 0.765],
    "p_target_random_direction": [0.012, 0.013, 0.014],
    "p_target_mean_difference_equal_norm": [0.012, 0.513, 0.914],
    "p_target_probe": [0.012, 0.523, 0.924],
    "p_target_mean_difference": [0.012, 0.533, 0.934],
    "p_target_all_channels": [0.012, 0.543, 0.944],
}


def sweep(site: str, channel: int | list[int]) -> dict[str, Any]:
    """A sweep with every curve, three strengths."""
    bands = {name: {"low": [0.9 * p for p in ps], "high": [1.05 * p for p in ps]} for name, ps in CURVES.items()}
    return CURVES | {
        "task": "quotes",
        "site": site,
        "channel": channel,
        "at": "read",
        "strengths": [0.0, 0.5, 1.0],
        "bands": bands,
        "p_target_by_direction": [0.881, 0.871],
        "prompts": 40,
        "accuracy_dense": 1.0,
        "accuracy_sparse": 0.95,
        "mean_difference_site": "final",
        "agreement": {"slope": 0.61, "r_squared": 0.82, "sign": 1.0, "r_squared_shuffled": 0.03},
        "side_effects": {
            "kl": 0.017,
            "ce_change": 0.018,
            "p_target_off": 0.719,
            "kl_added": 0.682,
            "kl_before_answer": 0.083,
            "tokens": 4096,
            "kl_other_tasks": 0.0074,
            "solved_other_tasks": [0.97, 0.93],
        },
    }


EXAMPLE = {
    "prompt": ["print", "('", "hello", " world"],
    "counterfactual": ["print", '("', "hello", " world"],
    "cue": [1],
    "answers": ["')"],
    "targets": ['")'],
}
TASK = {
    "name": "quotes",
    "description": "A string is closed by the quote that opened it, `'` or `\"`.",
    "pairs": 64,
    "solved": {"dense": 1.0, "sparse": 0.95},
    "examples": [EXAMPLE],
    "circuit": {"nodes": 4, "edges": 3, "loss": 0.031},
    "circuit_missing": "",
    "steering": {"one": sweep("0.mlp", 3), "few": sweep("0.mlp", [3, 5])},
    "steering_missing": "",
}
BARE_TASK = {
    "name": "a_hard_one",
    "description": "",
    "pairs": 64,
    "solved": {"dense": 0.62, "sparse": None},
    "examples": [],
    "circuit": None,
    "circuit_missing": "the sparse model does not solve it",
    "steering": {"one": None, "few": None},
    "steering_missing": "not solved",
}
CIRCUIT = {
    "task": "quotes",
    "columns": [
        {"place": "0.mlp.read", "label": "layer 0 MLP reads"},
        {"place": "0.mlp.neuron", "label": "layer 0 neurons"},
        {"place": "0.mlp.write", "label": "layer 0 MLP writes"},
        {"place": "final.read", "label": "final reads"},
    ],
    "nodes": [
        {"id": "0.mlp.read.3", "column": 0, "order": 0.2, "mean": -0.04, "ablation": 0.662, "tokens": "'zebra' +0.50"},
        {"id": "0.mlp.read.5", "column": 0, "order": 0.8, "mean": 0.05, "ablation": 0.221, "tokens": ""},
        {"id": "0.mlp.neuron.7", "column": 1, "order": 0.5, "mean": 0.06, "ablation": 0.443, "tokens": ""},
        {"id": "final.read.9", "column": 3, "order": 0.5, "mean": 0.07, "ablation": None, "tokens": '"\')" +0.41'},
        {"id": "0.mlp.write.9", "column": 2, "order": 0.5, "mean": 0.08, "ablation": 0.111, "tokens": ""},
    ],
    "edges": [
        {"source": 0, "target": 2, "weight": -0.52, "kind": "weight"},
        {"source": 1, "target": 2, "weight": 0.08, "kind": "weight"},
        {"source": 2, "target": 4, "weight": 0.33, "kind": "weight"},
        {"source": 4, "target": 3, "weight": 1.0, "kind": "stream"},
    ],
    "loss": 0.031,
    "loss_full_model": 0.012,
    "scale": 19.4,
    "shift": 14.35,
    "fresh": {"pairs": 200, "loss": 0.041, "loss_unscaled": 0.465, "accuracy": 0.985},
    "ablated": {"loss": 0.694, "accuracy": 0.5},
    "ablation_by_layer": [{"layer": "0.mlp", "loss": 0.654}],
    "attention": [
        {
            "layer": 1,
            "head": 2,
            "prompts": [
                {"name": "single", "tokens": ["a", "b"], "pattern": [[0.75, 0.0], [0.25, 0.5]]},
                {"name": "double", "tokens": ["c", "d"], "pattern": [[1.0, 0.0], [0.4, 0.6]]},
            ],
        },
    ],
    "controls": [
        {"name": "permuted weights", "value": "3 nodes, 2 edges", "as_good": True},
        {"name": "shuffled labels", "value": "no circuit; best loss 0.693", "as_good": False},
    ],
    "verdict": ["A model with permuted weights has a circuit of this size too."],
}


def crowded_circuit(nodes: int = 60, weights: int = 1500) -> dict[str, Any]:
    """A circuit with more weights than are drawn one by one, seeded."""
    draw = random.Random(1)
    columns = sorted(draw.randrange(4) for _ in range(nodes))
    made = [
        {"id": f"0.mlp.read.{i}", "column": column, "order": draw.random(), "mean": 0.0, "ablation": 0.1, "tokens": ""}
        for i, column in enumerate(columns)
    ]
    pairs = [(i, j) for i in range(nodes) for j in range(nodes) if columns[i] < columns[j]]
    edges = [
        {"source": i, "target": j, "weight": draw.gauss(0, 0.2), "kind": "weight"}
        for i, j in draw.sample(pairs, min(weights, len(pairs)))
    ]
    return CIRCUIT | {"task": "crowded", "nodes": made, "edges": edges, "attention": []}


def context(value: float, tokens: list[str], at: int) -> dict[str, Any]:
    """A context whose one active token is `at`; the encoder reads half of the value everywhere."""
    values = [value if i == at else 0.0 for i in range(len(tokens))]
    readings = [value / 2] * len(tokens)
    return {"row": 1, "position": 9, "value": value, "tokens": tokens, "values": values, "at": at, "readings": readings}


CHANNEL = {
    "node": "0.mlp.read.3",
    "tokens": 16384,
    "density": 0.0213,
    "mean": -0.041,
    "percentiles": {"0": -4.0, "5": -3.0, "25": -2.0, "50": -1.5, "75": -1.0, "95": 2.5, "100": 5.8},
    "positive": [context(5.81, ["\n", "the", " con", "cat"], 2)],
    "negative": [context(-4.02, ["x", "</script><b>", " = "], 1)],
    "random": [context(-1.51, ["y", " <!--"], 1)],
    "weights_in": [["token zebra", 0.51], ["0.attn.write.3", 1.0]],
    "weights_out": [["0.mlp.neuron.7", -0.52], ["token ')", 0.27]],
    "dense": {
        "site": "0.mlp",
        "dense_site": "0.mlp",
        "channel": 3,
        "encoder_correlation": 0.72,
        "both_active": 0.0114,
        "either_active": 0.587,
        "added": 5.67,
        "tokens": 2048,
        "raised": [["me", 3.91], [" it", 2.9]],
        "lowered": [['")', -3.62]],
        "kl": 1.675,
        "kl_random": 2.111,
        "task": "quotes",
        "mean_difference": -0.26,
    },
    "no_dense_side": "",
    "histogram": {"edges": [-4.0, -1.0, 2.0, 6.0], "counts": [120, 40, 7]},
    "task_contexts": {"quotes": [context(3.3, ["print", "('"], 1), context(-3.4, ["print", '("'], 1)]},
    "decoder_column": [[4, 0.83], [1, -0.57]],
}
BARE_CHANNEL = CHANNEL | {
    "node": "0.mlp.neuron.7",
    "positive": [],
    "negative": [],
    "random": [],
    "percentiles": {},
    "weights_in": [],
    "weights_out": [],
    "dense": None,
    "no_dense_side": "it is a neuron",
    "histogram": None,
    "task_contexts": {},
    "decoder_column": None,
}
MODEL = {"layers": 2, "width": 8, "parameters": 5432, "nonzeros": None}


def page_data() -> dict[str, Any]:
    """Everything once."""
    data = {
        "format": 1,
        "title": "A pair made by hand",
        "versions": {"sparse-bridges": "0.1.0"},
        "headline": "quotes",
        "models": {
            "dense": MODEL | {"name": "small dense"},
            "sparse": MODEL | {"name": "small sparse", "nonzeros": 321},
        },
        "bridges": {
            "tokens": 4096,
            "nmse_tokens": 8128,
            "dense_ce": 1.525,
            "sparse_ce": 1.729,
            "kl_sparse_alone": 0.197,
            "sites": SITES,
            "mean": MEAN,
        },
        "text": "text by hand",
        "left_out": {"my_task": "its prompts are not here"},
        "tasks": [TASK, BARE_TASK],
        "circuits": {"quotes": CIRCUIT},
        "channels": {"0.mlp.read.3": CHANNEL, "0.mlp.neuron.7": BARE_CHANNEL},
    }
    return copy.deepcopy(data)


def odd_page_data() -> dict[str, Any]:
    """Figures that are undefined at the first site, and an edit at strengths without 1."""
    data = page_data()
    data["bridges"]["sites"][0] |= {"nmse_encode": None, "kl_dense_to_sparse": None}
    data["tasks"][0]["steering"] = {"one": sweep("0.mlp", 3) | {"strengths": [-1.0, 0.0, 0.5]}, "few": None}
    return data


def crowded_page_data() -> dict[str, Any]:
    """One circuit, of many weights."""
    return page_data() | {"circuits": {"crowded": crowded_circuit()}}


def empty_page_data() -> dict[str, Any]:
    """Nothing but the models."""
    data = page_data()
    return (
        data
        | {"headline": "", "bridges": data["bridges"] | {"sites": [], "mean": {}}}
        | {
            "tasks": [],
            "left_out": {},
            "circuits": {},
            "channels": {},
        }
    )
