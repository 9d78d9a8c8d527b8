"""Other ways to generate: drafts that are checked, several answers per prompt, prompts packed into one batch."""

import pytest
import torch
from pairs import join, sparse_model, tokens, with_units
from steered import CHANNEL, EDITS, SITE, gpt2_without_eos, llama, slow_but, steered
from transformers import ContinuousBatchingConfig, GenerationConfig

from bridges.steering.edits import Edit

GREEDY = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
ONE = tokens(rows=1).clamp(min=1)

EVERY_KIND = {
    "constant": (EDITS["add"], {"sparse": None}),
    "last token": (Edit(SITE, CHANNEL, 3.0, "add", -1), {}),
    "per token": (Edit(SITE, CHANNEL, torch.full((1, 7), 2.0), "add"), {}),
    "sparse": (EDITS["several"], {}),
    "encoder": (EDITS["several"], {"source": "encoder"}),
    "encoder, first site": (EDITS["scale"], {"source": "encoder", "at": "residual"}),
}


@pytest.fixture(params=slow_but({"llama": llama, "gpt2": gpt2_without_eos}, "llama"), scope="module")
def pair(request):
    return with_units(join(request.param(), sparse_model()))


def drafts(pair):
    """A draft model of other weights, and one of the same, whose drafts are all accepted where nothing is edited."""
    other, same = type(pair.dense.model)(pair.dense.model.config).double().eval(), type(pair.dense.model)
    same = same(pair.dense.model.config).double().eval()
    same.load_state_dict(pair.dense.model.state_dict())
    for draft in (other, same):
        draft.generation_config = pair.dense.model.generation_config
        yield {"assistant_model": draft}
    yield {"prompt_lookup_num_tokens": 3}


@pytest.mark.parametrize(("edits", "options"), EVERY_KIND.values(), ids=EVERY_KIND)
def test_drafts_that_are_checked_give_the_same_text(pair, edits, options):
    """Of a rejected draft nothing is left in either model's cache."""
    model = pair.dense.model
    for how in drafts(pair):
        with steered(pair, edits, **options):
            expected = model.generate(ONE, **GREEDY)
            found = model.generate(ONE, **GREEDY, **how)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(torch.cat(found.logits), torch.cat(expected.logits), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("edits", "options"), EVERY_KIND.values(), ids=EVERY_KIND)
def test_each_of_several_answers_is_the_one_of_its_own_prompt(pair, edits, options):
    """The logits of a sampled text are those of a pass over it, row by row."""
    ids, model = tokens(rows=2).clamp(min=1), pair.dense.model
    if isinstance(getattr(edits, "value", None), torch.Tensor):
        edits = Edit(SITE, CHANNEL, torch.full((2, 7), 2.0), "add")
    options = {"at": "read", **options}
    with steered(pair, edits, **options), torch.no_grad():
        found = model.generate(ids, **{**GREEDY, "do_sample": True}, num_return_sequences=3)
        assert found.sequences.shape[0] == 6
        again = model.generate(ids, **{**GREEDY, "max_new_tokens": 1})
    for row in range(6):
        torch.testing.assert_close(found.logits[0][row], again.logits[0][row // 3])


def batched(model, ids):
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)  # by default it takes most of the memory
    rows = [row.tolist() for row in ids]
    outputs = model.generate_batch(rows, generation_config=config, continuous_batching_config=small)
    return [output.generated_tokens for output in outputs.values()]


def test_continuous_batching_goes_with_edits_of_one_number():
    pair = with_units(join(llama().float(), sparse_model(dtype=torch.float32)))
    model, ids = pair.dense.model, tokens().clamp(min=1)
    plain = model.generate(ids, max_new_tokens=3, do_sample=False)[:, 7:].tolist()
    with steered(pair, Edit(SITE, CHANNEL, 8.0, "add"), sparse=None):
        expected = model.generate(ids, max_new_tokens=3, do_sample=False)[:, 7:].tolist()
        assert batched(model, ids) == expected != plain


@pytest.mark.parametrize(("edits", "options"), list(EVERY_KIND.values())[1:], ids=list(EVERY_KIND)[1:])
def test_continuous_batching_is_refused_with_other_edits(pair, edits, options):
    model = pair.dense.model
    with steered(pair, edits, **options):
        for call in (lambda: batched(model, ONE), model.init_continuous_batching):
            with pytest.raises(ValueError, match=r"generate_batch \(continuous batching\) packs .*: call generate"):
                call()
