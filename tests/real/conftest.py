"""A real pretrained model, fetched once: `make test-real`."""

import pytest
from get_smollm2 import gguf_folder, smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="session")
def folder():
    """SmolLM2-135M-Instruct as an ordinary folder, in float32."""
    return smollm2()


@pytest.fixture(scope="session")
def gguf():
    """The folder of the GGUF file that it was made of."""
    return gguf_folder()


@pytest.fixture(scope="session")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="session")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)
