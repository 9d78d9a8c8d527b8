import pytest
import torch

from bridges.models.huggingface.recording import model_inputs, probe_batches


def test_probes_have_left_and_right_padding_and_leave_the_global_seed_alone(tiny):
    model, state = tiny("gpt2"), torch.get_rng_state()
    (plain, none), (tokens, mask) = probe_batches(model)
    assert none is None and torch.equal(plain, tokens) and tokens.shape == (3, 8)
    assert mask.tolist() == [[1] * 8, [0] * 3 + [1] * 5, [1] * 6 + [0] * 2]
    assert torch.equal(torch.get_rng_state(), state)
    assert int(tokens.max()) < 61


@pytest.mark.parametrize(("family", "positions"), [("llama", True), ("bloom", False), ("mamba", False)])
def test_positions_follow_the_mask_where_the_model_takes_them(family, positions, tiny, tokens, padding):
    model = tiny(family)
    assert set(model_inputs(model, tokens, None)) == {"input_ids", "use_cache"}
    inputs = model_inputs(model, tokens, padding)
    assert inputs["use_cache"] is False and ("position_ids" in inputs) is positions
    if positions:
        assert inputs["position_ids"][0].tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 4]
