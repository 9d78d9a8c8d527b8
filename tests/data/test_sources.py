from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer

import bridges
from bridges.data.rows import Rows
from bridges.data.sources import ReadLimit, load_rows

IDS = torch.arange(1, 21).view(4, 5)
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
RAGGED = [[1, 2, 3], [4], [5, 6, 7, 8]]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(bridges.__file__).parent / "assets" / "tokenizer")


class Named:
    """Rows of a map-style data set, as a DataLoader wants them."""

    def __len__(self):
        return len(IDS)

    def __getitem__(self, i):
        return {"input_ids": IDS[i], "attention_mask": MASK[i], "labels": IDS[i]}


PLAIN = {
    "tensor": lambda: IDS,
    "int32 tensor": lambda: IDS.int(),
    "uint8 tensor": lambda: IDS.to(torch.uint8),
    "array": lambda: IDS.numpy(),
    "list of batches": lambda: [IDS[:3], IDS[3:]],
    "list of rows": lambda: list(IDS),
    "list of lists": lambda: IDS.tolist(),
    "batches of lists": lambda: [IDS[:3].tolist(), IDS[3:].tolist()],
    "arrays of uint16": lambda: [IDS[:3].numpy().astype(np.uint16), IDS[3:].numpy().astype(np.uint16)],
    "DataLoader": lambda: DataLoader(IDS, batch_size=3),
    "DataLoader of TensorDataset": lambda: DataLoader(TensorDataset(IDS), batch_size=3),
    "generator": lambda: (batch for batch in IDS.split(3)),
    "dicts": lambda: [{"input_ids": IDS[:3]}, {"input_ids": IDS[3:]}],
    "one batch": lambda: {"input_ids": IDS},
    "rows of a dataset": lambda: datasets.Dataset.from_dict({"input_ids": IDS.tolist()}),
}
MASKED = {
    "dicts": lambda: [{"input_ids": IDS[:3], "attention_mask": MASK[:3]}, {"input_ids": IDS[3:]}],
    "one batch of lists": lambda: {"input_ids": IDS.tolist(), "attention_mask": MASK.tolist()},
    "dicts with a bool mask": lambda: [{"input_ids": IDS, "attention_mask": MASK.bool()}],
    "DataLoader of dicts": lambda: DataLoader(Named(), batch_size=3),
    "dataset": lambda: datasets.Dataset.from_dict({"input_ids": IDS.tolist(), "attention_mask": MASK.tolist()}),
    "dataset of tensors": lambda: datasets.Dataset.from_dict(
        {"input_ids": IDS.tolist(), "attention_mask": MASK.tolist()}
    ).with_format("torch"),
    "streamed dataset": lambda: datasets.Dataset.from_dict(
        {"input_ids": IDS.tolist(), "attention_mask": MASK.tolist()}
    ).to_iterable_dataset(),
}


@pytest.mark.parametrize("form", PLAIN)
def test_rows_without_padding_are_read_from_every_form(form):
    rows = load_rows(PLAIN[form](), seed=3)
    assert torch.equal(rows.input_ids, IDS) and rows.input_ids.dtype == torch.int64
    assert rows.attention_mask is None and rows.seed == 3


@pytest.mark.parametrize("form", MASKED)
def test_rows_with_a_mask_are_read_from_every_form(form):
    rows = load_rows(MASKED[form]())
    assert torch.equal(rows.input_ids, IDS) and torch.equal(rows.attention_mask, MASK)


def test_rows_are_returned_as_they_are():
    rows = Rows(IDS)
    assert load_rows(rows) is rows


@pytest.mark.parametrize(
    "data", [RAGGED, [torch.tensor(row) for row in RAGGED], datasets.Dataset.from_dict({"input_ids": RAGGED})]
)
def test_shorter_rows_are_padded_on_the_right(data):
    rows = load_rows(data)
    assert rows.input_ids.tolist() == [[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 7, 8]]
    assert rows.attention_mask.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("data", [IDS, list(IDS), {"input_ids": IDS}])
def test_seq_len_cuts_rows_and_never_widens_them(data):
    assert torch.equal(load_rows(data, seq_len=3).input_ids, IDS[:, :3])
    assert torch.equal(load_rows(data, seq_len=9).input_ids, IDS)


def test_a_row_that_is_cut_loses_its_padding_on_the_left_first():
    ids = torch.arange(1, 13).view(2, 6)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    rows = load_rows({"input_ids": ids, "attention_mask": mask}, seq_len=4)
    assert rows.input_ids.tolist() == [[4, 5, 6, 0], [8, 9, 10, 11]]
    assert rows.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    whole = load_rows({"input_ids": ids, "attention_mask": mask}, seq_len=6)
    assert torch.equal(whole.input_ids, ids) and torch.equal(whole.attention_mask, mask)


def test_an_endless_source_is_read_until_rows_and_tokens_are_enough():
    def endless():
        i = 0
        while True:
            yield torch.full((2, 5), i)
            i += 1

    source = endless()
    assert len(load_rows(source, limit=ReadLimit(rows=3, tokens=1))) == 4
    assert next(source)[0, 0] == 2  # nothing was read ahead
    assert len(load_rows(endless(), limit=ReadLimit(rows=1, tokens=31))) == 8
    assert len(load_rows([IDS], limit=ReadLimit(rows=99, tokens=99))) == 4


def expected_rows(tokenizer, texts, seq_len):
    """Documents, each closed by EOS, one after another; rows of BOS and the next seq_len - 1 tokens."""
    stream = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    width = seq_len - 1
    starts = range(0, len(stream) - width + 1, width)
    return [[tokenizer.bos_token_id, *stream[start : start + width]] for start in starts]


def test_text_files_and_folders_of_them_are_packed_into_rows(tokenizer, tmp_path):
    texts = {"b.py": "def f(x):\n    return x + 1\n", "a/z.txt": 'print("one", "two")\n' * 3, "c": "x = [1, 2]\n"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "no.txt").write_text("hidden " * 99)
    (tmp_path / "picture.bin").write_bytes(b"\x89\0\0" * 99)
    (tmp_path / "odd.txt").write_bytes(b"")
    one = load_rows(tmp_path / "b.py", tokenizer, seq_len=4)
    assert one.input_ids.tolist() == expected_rows(tokenizer, [texts["b.py"]], 4) and one.attention_mask is None
    whole = load_rows(str(tmp_path), tokenizer, seq_len=5)
    assert whole.input_ids.tolist() == expected_rows(tokenizer, [texts["a/z.txt"], texts["b.py"], texts["c"], ""], 5)


def test_text_that_is_not_utf8_is_read(tokenizer, tmp_path):
    (tmp_path / "latin.txt").write_bytes("# café\nx = 1\n".encode("latin-1") * 5)
    assert len(load_rows(tmp_path, tokenizer, seq_len=4)) > 3


class WithoutEos:
    eos_token_id = None


REFUSED = {
    "floats": (lambda: torch.ones(2, 3), r"data=\(2, 3\) of torch.float32"),
    "one row": (lambda: IDS[0], r"data=\(5,\) of torch.int64"),
    "three dimensions": (lambda: IDS[None], r"data=\(1, 4, 5\)"),
    "a number": (lambda: 3, "data=int must be token ids"),
    "a bare data set": (lambda: TensorDataset(IDS), "data=TensorDataset must be token ids"),
    "nothing": (lambda: [], "data holds no rows"),
    "an empty tensor": (lambda: IDS[:0], r"data=\(0, 5\) .* at least one row"),
    "texts": (lambda: ["some text"], "a batch is the text 'some text'; tokenize it first"),
    "used up": (lambda: iter(()), "an iterator can be read only once"),
    "text rows": (lambda: [{"text": "x"}], r"keys \['text'\], but not 'input_ids'; tokenize"),
    "float batch": (lambda: [torch.ones(2, 3)], r"a batch is \(2, 3\) of torch.float32"),
    "deep batch": (lambda: [IDS[None]], r"a batch is \(1, 4, 5\)"),
    "mask of another shape": (
        lambda: [{"input_ids": IDS, "attention_mask": MASK[:, :4]}],
        r"attention_mask \(4, 4\) must have the shape \(4, 5\)",
    ),
    "nameless mask": (lambda: DataLoader(TensorDataset(IDS, MASK), 2), "a batch is 2 tensors without names"),
    "text without tokenizer": (lambda: Path("x.txt"), "data='x.txt' is text: pass tokenizer="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_data_of_another_form_is_refused(case):
    data, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        load_rows(data())


def test_text_that_makes_no_row_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"data='.*nothing' does not exist"):
        load_rows(tmp_path / "nothing", tokenizer)
    (tmp_path / "short.txt").write_text("x = 1")
    with pytest.raises(ValueError, match=r"short.txt' holds \d tokens, fewer than one row of seq_len=64"):
        load_rows(tmp_path / "short.txt", tokenizer, seq_len=64)
    with pytest.raises(ValueError, match="tokenizer has no EOS"):
        load_rows(tmp_path, WithoutEos())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty' holds 0 tokens, fewer than one row of seq_len=128"):
        load_rows(tmp_path / "empty", tokenizer)
