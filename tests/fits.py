"""Small fits for the tests of `fit`, and what two of them are compared by."""

import json

import torch
from pairs import gpt2, sparse_model, tokens

from bridges.fit import fit

DATA = tokens(12, 8, seed=21)
BASE = {"steps": 3, "batch_size": 4, "closed_form_tokens": 100, "lr": 1e-3, "progress": False}
SPARSE = {"train_sparse": True, "target_density": 0.5}


def shallow(model=gpt2, **options):
    """A model of one layer, so three sites."""
    return model(layers=1, **options)


def run(data=DATA, dense=None, sparse=None, **settings):
    """A fit of three steps between two models of one layer, unless other settings are given."""
    return fit(dense or shallow(), sparse or shallow(sparse_model), data, **{**BASE, **settings})


def outcome(bridge_set):
    """Every parameter, R and figure in one row of numbers; an undefined figure as -1."""
    figures = torch.tensor(list(bridge_set.report.flat().values()), dtype=torch.float64).nan_to_num(nan=-1)
    return torch.cat([*(tensor.double().flatten() for tensor in bridge_set.tensors().values()), figures])


def same(one, other):
    """Whether two bridge sets are equal, bit for bit."""
    return one.site_pairs == other.site_pairs and torch.equal(outcome(one), outcome(other))


def rows(folder):
    """The rows of `metrics.jsonl` without the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def files(folder):
    """What a run leaves that must not depend on the clock or on interruptions."""
    names = ["bridges.safetensors", "report.json", "config.json", "README.md", "quality.png", "sparse/nonzeros"]
    found = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    return found | {file.name: file.read_bytes() for file in folder.glob("sparse/*.safetensors")}


def raiser(error):
    """A function that raises `error`, to put in the place of another."""

    def raises(*args, **kwargs):
        raise error

    return raises
