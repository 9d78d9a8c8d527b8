"""Rows that hold several documents: edits that depend on tokens refuse them, edits of one number go on."""

import pytest
import torch
from pairs import MASK, join, sparse_model, tokens, with_units
from steered import CHANNEL, EDITS, LEFT, SITE, llama, logits, steered
from transformers import DataCollatorWithFlattening

from bridges.steering.edits import Edit

LENGTHS = (3, 4, 2)
ROW = tokens(rows=1, width=sum(LENGTHS))
RESTARTED = torch.cat([torch.arange(n) for n in LENGTHS])[None]
NUMBERED = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)])[None]
BOUNDS = torch.tensor([0, 3, 7, 9], dtype=torch.int32)


@pytest.fixture(scope="module")
def pair():
    return with_units(join(llama(), sparse_model()))


EVERY_KIND = {
    "positions": (Edit(SITE, CHANNEL, 3.0, "add", 0), {}),
    "per token": (Edit(SITE, CHANNEL, torch.ones(1, 9), "add"), {}),
    "sparse": (EDITS["several"], {}),
    "encoder": (EDITS["several"], {"source": "encoder"}),
    "encoder, first site": (EDITS["scale"], {"source": "encoder", "at": "residual"}),
}
PACKED = {
    "positions": ({"position_ids": RESTARTED}, "position_ids go back to 0 at column 3 of row 0"),
    "documents": ({"seq_idx": NUMBERED}, "seq_idx of row 0 has the values"),
    "bounds": ({"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS}, "cu_seq_lens_q has 3 documents in 1 row"),
    "numbered mask": ({"attention_mask": NUMBERED + 1}, "attention_mask holds [23]; it must be 1 at real tokens"),
    "4-d mask": ({"attention_mask": torch.ones(1, 1, 9, 9)}, r"attention_mask \(1, 1, 9, 9\) must be \[batch, seq\]"),
    "dictionary": ({"attention_mask": {"full_attention": None}}, r"attention_mask dict must be \[batch, seq\]"),
}


@pytest.mark.parametrize(("edits", "options"), EVERY_KIND.values(), ids=EVERY_KIND)
@pytest.mark.parametrize(("arguments", "message"), PACKED.values(), ids=PACKED)
def test_packed_rows_are_refused_by_the_argument_that_says_so(pair, edits, options, arguments, message):
    with steered(pair, edits, **options), pytest.raises(ValueError, match=message):
        pair.dense.model(ROW, **arguments)


@pytest.mark.parametrize("name", ["positions", "documents", "bounds"])
def test_a_generate_from_packed_rows_is_refused_too(pair, name):
    arguments, message = PACKED[name]
    with steered(pair, EVERY_KIND["positions"][0]), pytest.raises(ValueError, match=message):
        pair.dense.model.generate(ROW, **arguments, max_new_tokens=1, do_sample=False)


def test_a_generate_that_is_given_the_positions_of_padded_prompts_goes_on(pair):
    ids = tokens()[:2]
    options = {"attention_mask": LEFT[:2], "max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    positions = (LEFT[:2].cumsum(1) - 1).clamp(min=0)
    with steered(pair, EVERY_KIND["positions"][0]):
        found = pair.dense.model.generate(ids, position_ids=positions, **options)
        assert torch.equal(found, pair.dense.model.generate(ids, **options))


def test_what_a_flattening_collator_gives_is_refused(pair):
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": part.tolist()} for part in ROW[0].split(LENGTHS)])
    with steered(pair, EDITS["set"]), pytest.raises(ValueError, match="cu_seq_lens_q has 3 documents in 1 row"):
        pair.dense.model(**batch)
    batch = DataCollatorWithFlattening()([{"input_ids": part.tolist()} for part in ROW[0].split(LENGTHS)])
    with steered(pair, EDITS["set"]), pytest.raises(ValueError, match="position_ids go back to 0 at column 3"):
        pair.dense.model(**batch)


@pytest.mark.parametrize("at", ["read", "residual"])
def test_edits_of_one_number_go_with_packed_rows(pair, at):
    """The oracle runs each document alone."""
    model, documents = pair.dense.model, ROW.split(LENGTHS, dim=1)
    with steered(pair, EDITS["add"], sparse=None, at=at), torch.no_grad():
        expected = torch.cat([model(part).logits for part in documents], 1)
        found = model(ROW, position_ids=RESTARTED, use_cache=False).logits
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, model(ROW, position_ids=RESTARTED, use_cache=False).logits)


def counted(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("mask", [LEFT, LEFT.flip(1), MASK[:3].repeat(2, 1)[:4]], ids=["left", "right", "both"])
@pytest.mark.parametrize(("edits", "options"), list(EVERY_KIND.values())[2:], ids=list(EVERY_KIND)[2:])
def test_positions_that_count_a_rows_tokens_are_taken(pair, mask, edits, options):
    """From 0 or from elsewhere (rotary positions are relative), and anything on padding."""
    ids, real, model = tokens(), mask.bool(), pair.dense.model
    with steered(pair, edits, **options), torch.no_grad():
        expected = logits(pair, ids, mask)[real]
        for positions in (counted(mask), counted(mask) + 3, counted(mask).masked_fill(~real, 1)):
            found = model(ids, attention_mask=mask, position_ids=positions).logits[real]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # rotations are made in float32


def test_one_row_of_positions_is_for_all_rows(pair):
    ids = tokens()
    with steered(pair, EDITS["several"]), torch.no_grad():
        found = pair.dense.model(ids, position_ids=torch.arange(7)[None]).logits
        torch.testing.assert_close(found, logits(pair, ids))
        with pytest.raises(ValueError, match=r"position_ids \(1, 6\) must have the shape \(4, 7\) of input_ids"):
            pair.dense.model(ids, position_ids=torch.arange(6)[None])


def test_positions_that_begin_again_on_a_cache_are_refused(pair):
    ids, model = tokens(), pair.dense.model
    with steered(pair, EDITS["several"]), torch.no_grad():
        cache = model(ids[:, :4], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="position_ids go back to 0 at column 0 of row 0"):
            model(ids[:, 4:], past_key_values=cache, position_ids=torch.arange(3)[None])
        found = model(ids[:, 4:], past_key_values=cache, position_ids=torch.arange(4, 7)[None]).logits
        torch.testing.assert_close(found, logits(pair, ids)[:, 4:])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64, torch.int32])
def test_a_mask_of_zeros_and_ones_counts_as_one_whatever_its_type(pair, dtype):
    ids = tokens()
    for edits, options in list(EVERY_KIND.values())[2:]:
        with steered(pair, edits, **options), torch.no_grad():
            expected = logits(pair, ids, LEFT)
            found = pair.dense.model(ids, attention_mask=LEFT.to(dtype), position_ids=counted(LEFT)).logits
        torch.testing.assert_close(found[LEFT.bool()], expected[LEFT.bool()])


def test_what_the_sparse_model_would_not_see_is_refused(pair):
    """A tensor of zeros says nothing; the encoder's own run is given everything."""
    with steered(pair, EDITS["set"]) as model, torch.no_grad():
        with pytest.raises(ValueError, match="head_kinds: the model given as sparse= reads tokens alone"):
            model(ROW, head_kinds=torch.ones(1))
        torch.testing.assert_close(model(ROW, head_kinds=torch.zeros(1)).logits, logits(pair, ROW))
