"""Rows that several documents are packed into are refused by the name of what says so; other columns are ignored."""

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening

from bridges.data.sources import load_rows

IDS = torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, 4, 5]])
LEFT = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def flattened(**options):
    """One row of two documents, as transformers' own collator makes it."""
    examples = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    return DataCollatorWithFlattening(return_tensors="pt", **options)(examples)


PACKED = {
    "flattening collator": (flattened, "position_ids of row 0 do not count its real tokens from 0"),
    "flattening collator without positions": (
        lambda: flattened(return_position_ids=False, return_seq_idx=True),
        r"seq_idx of row 0 has the values \[0, 1\]",
    ),
    "flattening collator for flash attention": (
        lambda: flattened(return_position_ids=False, return_flash_attn_kwargs=True),
        r"cu_seq_lens_q has 2 documents in 1 row\(s\)",
    ),
    "positions of one of two rows": (
        lambda: {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]])},
        "position_ids of row 1 ",
    ),
    "one row of positions for padded rows": (
        lambda: {"input_ids": IDS, "attention_mask": LEFT, "position_ids": torch.arange(5)[None]},
        "position_ids of row 1 ",
    ),
    "positions from 1": (lambda: {"input_ids": IDS, "position_ids": torch.arange(1, 6).expand(2, 5)}, "of row 0 "),
    "positions in three dimensions": (
        lambda: {"input_ids": IDS, "position_ids": torch.arange(5).expand(3, 2, 5)},
        "position_ids of row 0 ",
    ),
    "document numbers as a mask": (
        lambda: {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 2, 2, 0]])},
        "attention_mask holds 2; it must be 1 at real tokens and 0 at padding. Where it numbers packed documents, make",
    ),
    "a mask to add to scores": (
        lambda: {"input_ids": IDS, "attention_mask": (LEFT - 1) * 1e9},
        "attention_mask holds -1e[+]09; it must be 1",
    ),
    "a mask per pair of tokens": (
        lambda: {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 5, 5)},
        r"attention_mask \(2, 1, 5, 5\) must have the shape \(2, 5\)",
    ),
    "lists of lengths": (lambda: {"input_ids": IDS.tolist(), "seq_lengths": [[5], [2, 3]]}, "seq_lengths has 3 doc"),
    "lengths of an example": (
        lambda: [{"input_ids": [5, 6, 7], "seq_lens": [1, 2]}],
        "seq_lens has 2 documents in 1 r",
    ),
    "a packed data set": (
        lambda: Dataset.from_dict({"input_ids": IDS.tolist(), "position_ids": [[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]}),
        "position_ids of row 0 ",
    ),
    "segments": (lambda: {"input_ids": IDS, "token_type_ids": torch.tensor([[0, 0, 1, 1, 1]] * 2)}, "token_type_ids"),
    "other segments than the first": (
        lambda: {"input_ids": IDS, "token_type_ids": torch.ones_like(IDS)},
        r"values \[1",
    ),
    "embeddings": (lambda: {"input_ids": IDS, "inputs_embeds": torch.ones(2, 5, 3)}, "a batch has inputs_embeds"),
    "images": (lambda: {"input_ids": IDS, "pixel_values": torch.ones(2, 3, 4, 4)}, "a batch has pixel_values"),
}


@pytest.mark.parametrize("case", PACKED)
def test_packed_rows_are_refused_by_name(case):
    data, message = PACKED[case]
    with pytest.raises(ValueError, match=f"^eval_data: .*{message}"):
        load_rows(data(), name="eval_data")


HARMLESS = {
    "labels": torch.tensor([[-100, 6, 7, 8, 9], [1, 2, -100, 4, 5]]),
    "text": ["one", "two"],
    "doc_ids": ["wiki-1", "wiki-2"],
    "document_ids": torch.tensor([[7] * 5, [8] * 5]),
    "segment_ids": torch.tensor([3, 4]),
    "seq_lengths": torch.tensor([5, 3]),
    "position_ids": torch.tensor([[0, 1, 2, 3, 4], [1, 1, 0, 1, 2]]),
    "token_type_ids": torch.zeros(2, 5),
    "cu_seq_lens_q": torch.tensor([0, 5, 10]),
    "max_length_q": 5,
    "pixel_values": None,
    "score": torch.tensor([0.5, 0.25]),
}


OF_A_BATCH = ("cu_seq_lens_q", "max_length_q", "pixel_values")
CASES = [("batch", name) for name in HARMLESS] + [("examples", name) for name in HARMLESS if name not in OF_A_BATCH]


@pytest.mark.parametrize(("form", "column"), CASES)
def test_columns_that_do_not_change_what_the_rows_mean_are_ignored(form, column):
    batch = {"input_ids": IDS, "attention_mask": LEFT, column: HARMLESS[column]}
    data = batch if form == "batch" else [{name: value[i] for name, value in batch.items()} for i in range(2)]
    rows = load_rows(data)
    assert torch.equal(rows.input_ids, IDS) and torch.equal(rows.attention_mask, LEFT)


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.uint8, torch.float32, torch.bfloat16])
def test_a_mask_of_any_type_is_the_same_mask(kind):
    rows = load_rows({"input_ids": IDS, "attention_mask": LEFT.to(kind)})
    assert rows.attention_mask.dtype == torch.long and torch.equal(rows.attention_mask, LEFT)
