import pytest
import torch

from bridges.models.huggingface import decompose as probing


def test_difference_is_relative_to_the_largest_magnitude():
    theirs = torch.tensor([4.0, -8.0])
    assert probing.difference(theirs, theirs) == 0
    assert probing.difference(theirs + torch.tensor([0.0, 2.0]), theirs) == 0.25
    assert probing.difference(torch.tensor([float("nan")]), torch.tensor([float("nan")])) == float("inf")
    assert probing.difference(torch.tensor([1.0]), torch.tensor([float("inf")])) == float("inf")


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 0), (torch.float32, 0), (torch.bfloat16, 8 / 128), (torch.float16, 8 / 1024)],
)
def test_tolerance_on_a_cpu(dtype, tolerance):
    assert probing.tolerance(torch.ones(1, dtype=dtype)) == tolerance


def test_tolerance_elsewhere_allows_another_order_of_summation():
    assert probing.tolerance(torch.ones(1, device="meta")) == 64 * 2.0**-23
    assert probing.tolerance(torch.ones(1, device="meta", dtype=torch.bfloat16)) == 8 * 2.0**-7


def test_a_layer_is_split_when_the_halves_fit_and_the_parallel_sum_does_not():
    whole = torch.tensor([100.0, 0.0], dtype=torch.bfloat16)
    near, far = torch.tensor([100.5, 0.0], dtype=torch.bfloat16), torch.tensor([150.0, 0.0], dtype=torch.bfloat16)
    assert probing.same_layer(whole, whole, whole)
    assert probing.same_layer(near, whole, far)
    assert not probing.same_layer(near, whole, near)
    assert not probing.same_layer(far, whole, far)
    assert not probing.same_layer(near.float(), whole.float(), far.float())


def test_probes_hold_left_and_right_padding_and_move_no_seed(tiny):
    model, state = tiny("gpt2"), torch.get_rng_state()
    (plain, none), (tokens, mask) = probing.probes(model)
    assert none is None and torch.equal(plain, tokens) and tokens.shape == (3, 8)
    assert mask.tolist() == [[1] * 8, [0] * 3 + [1] * 5, [1] * 6 + [0] * 2]
    assert torch.equal(torch.get_rng_state(), state)
    assert int(tokens.max()) < 61


@pytest.mark.parametrize(("family", "positions"), [("llama", True), ("bloom", False), ("mamba", False)])
def test_positions_follow_the_mask_where_the_model_takes_them(family, positions, tiny, tokens, padding):
    model = tiny(family)
    assert set(probing.model_inputs(model, tokens, None)) == {"input_ids", "use_cache"}
    inputs = probing.model_inputs(model, tokens, padding)
    assert inputs["use_cache"] is False and ("position_ids" in inputs) is positions
    if positions:
        assert inputs["position_ids"][0].tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 4]
