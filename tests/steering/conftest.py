import pytest
from pairs import join, sparse_model, with_units
from steered import gpt2_without_eos


@pytest.fixture
def pair():
    return with_units(join(gpt2_without_eos(), sparse_model()))
