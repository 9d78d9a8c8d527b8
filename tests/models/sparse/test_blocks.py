import math

import pytest
import torch

from bridges.models.sparse.blocks import RMSNorm, attention_pattern, sinusoids


def test_rms_norm_takes_the_eps_of_float32_unless_it_is_float64():
    x = [1e-4, -2e-4]
    for dtype, eps in ((torch.float32, 2.0**-23), (torch.bfloat16, 2.0**-23), (torch.float64, 2.0**-52)):
        expected = x[0] / math.sqrt((x[0] ** 2 + x[1] ** 2) / 2 + eps)
        out = RMSNorm(2).to(dtype)(torch.tensor(x, dtype=dtype))[0].item()
        assert out == pytest.approx(expected, rel=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_attention_pattern_of_a_continued_padded_row():
    allowed = attention_pattern(2, 2, torch.tensor([[0, 1, 1, 1]]), torch.device("cpu"))
    assert allowed[0, 0].int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 1]]


def test_sines_on_even_channels_and_cosines_on_odd_ones():
    table = sinusoids(8, 6)
    assert table[5, 2].item() == pytest.approx(math.sin(5 / 10000 ** (2 / 6)), abs=1e-6)
    assert table[7, 5].item() == pytest.approx(math.cos(7 / 10000 ** (4 / 6)), abs=1e-6)
    assert sinusoids(3, 5).shape == (3, 5)
