"""The verdict on a circuit in words: each line appears where its control does as well, and nowhere else."""

import pytest

from bridges.circuits.circuit import Circuit
from bridges.circuits.controls import verdict

CIRCUIT = Circuit("mine", {"final.read": tuple(range(10))}, [], {}, loss=0.15, settings={"target_loss": 0.15})
GOOD = {
    "heldout": {"loss": 0.2},
    "necessity": {"loss": 0.69},
    "outside_kept": [{"p": 0.1, "worst": 0.2}, {"p": 0.5, "worst": 0.25}],
    "interchange": {"followed": 0.9},
    "shuffled_labels": {"nodes": None, "loss": 0.69},
    "meaningless_cue": {"nodes": None, "loss": 0.69},
    "permuted_weights": {"nodes": 200, "loss": 0.15},
    "forbidden": {"nodes": None, "loss": 0.6},
}


@pytest.mark.parametrize(
    ("control", "values", "said"),
    [
        ("heldout", {"loss": 0.31}, "fails on new pairs: the loss there is 0.310"),
        ("necessity", {"loss": 0.05}, "not necessary: without the circuit the model does the task too (loss 0.050)"),
        ("outside_kept", [{"p": 0.5, "worst": 0.31}], "disturbed from outside: with some other nodes running"),
        (
            "interchange",
            {"followed": 0.3},
            "does not carry the answer: exchanging its nodes moves",
        ),
        ("shuffled_labels", {"nodes": 11}, "shuffled labels: a circuit of 11 nodes is found there too, against 10"),
        ("meaningless_cue", {"nodes": 10}, "meaningless cue: a circuit of 10 nodes is found there too, against 10"),
        ("permuted_weights", {"nodes": 9}, "permuted weights: a circuit of 9 nodes is found there too, against 10"),
        ("forbidden", {"nodes": 40}, "redundant: without these nodes another circuit of 40 nodes is found"),
    ],
)
def test_a_control_that_does_as_well_is_named_alone(control, values, said):
    (line,) = verdict(CIRCUIT, {**GOOD, control: values})
    assert said in line


def test_where_none_does_a_line_says_so():
    assert verdict(CIRCUIT, GOOD) == ["no control does as well as the circuit"]
