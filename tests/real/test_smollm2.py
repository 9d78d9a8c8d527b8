"""What a user's own model meets first: it is read, taken apart bit for bit, and the tasks are made of its tokens."""

import pytest
import torch

import bridges
from bridges.io.fingerprint import fingerprint
from bridges.models.loading import find_tokenizer, load_model

pytestmark = pytest.mark.real

PROMPTS = ("The capital of France is", "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n    return")


@pytest.fixture(scope="module")
def batch(tokenizer):
    """Two prompts, the shorter one padded on the left, with the positions that `generate` gives them."""
    inputs = tokenizer(list(PROMPTS), padding=True, padding_side="left", return_tensors="pt")
    assert inputs.attention_mask[0].tolist() != inputs.attention_mask[1].tolist()
    return inputs.input_ids, inputs.attention_mask


@torch.no_grad()
def test_the_chain_is_the_model_bit_for_bit_at_every_site(model, batch):
    ids, mask = batch
    chain = bridges.as_residual(model)
    assert len(chain.sites) == 61 and chain.d_model == 576 and chain.vocab_size == 49_152
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    residuals, logits = chain.residuals(ids, mask)
    assert torch.equal(logits, expected)
    for site, residual in zip(chain.sites, residuals, strict=True):
        assert torch.equal(chain.run_from(site, residual, ids, mask), expected), site


@torch.no_grad()
def test_a_gguf_file_is_the_folder_that_was_made_of_it(model, tokenizer, gguf, batch):
    read = load_model(gguf)
    assert fingerprint(read) == fingerprint(model) and read.dtype == torch.float32
    assert torch.equal(read(*batch).logits, model(*batch).logits)
    found = find_tokenizer(read)
    assert found.get_vocab() == tokenizer.get_vocab() and found.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("task", bridges.TASKS)
def test_every_task_is_made_of_its_tokens(tokenizer, task):
    pairs = bridges.task_pairs(task, tokenizer, 40)
    assert len(pairs.input_ids) == 40 and int(pairs.input_ids.max()) < 49_152
    assert (pairs.answers >= 0).any(1).all() and (pairs.input_ids != pairs.counterfactual_ids).any(1).all()


@torch.no_grad()
@pytest.mark.parametrize("task", ["single_double_quote", "class_init", "enumerate_range", "while_return_true"])
def test_the_pairs_ask_what_it_can_answer(model, tokenizer, task):
    """In all forty prompts the answer is likelier than the counterfactual prompt's."""
    pairs = bridges.task_pairs(task, tokenizer, 40)
    p = model(pairs.input_ids, attention_mask=pairs.attention_mask).logits[:, -1].double().softmax(-1)
    right, wrong = (
        p.gather(1, tokens.clamp(min=0)).mul(tokens >= 0).sum(1) for tokens in (pairs.answers, pairs.targets)
    )
    assert (right > wrong).all()
