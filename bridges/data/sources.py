"""Rows of tokens from whatever a user passes as `data`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridges.config import DEFAULT_SEQ_LEN
from bridges.data.corpus import encode_documents, pack_rows
from bridges.data.packing import Row, refuse_other_meanings
from bridges.data.rows import Rows
from bridges.models.attention_mask import zero_one_mask


class ReadLimit(NamedTuple):
    """Where to stop reading an iterable, which may have no end: at so many rows and so many real tokens, both."""

    rows: int
    tokens: int


def load_rows(
    data: Any,
    tokenizer: Any = None,
    seq_len: int | None = None,
    limit: ReadLimit | None = None,
    seed: int = 0,
    name: str = "data",
) -> Rows:
    """Rows from a [n, seq] tensor, an iterable of batches or of dicts, or a path to text files.

    Rows longer than `seq_len` are cut, and text is packed into rows of that width; shorter rows are padded on the right
    to the longest. A row that is cut loses its padding on the left first. An iterable is read up to `limit`, or to its
    end. Raises ValueError that says what is wrong with `data`, which the caller may know by another `name`.
    """
    if isinstance(data, Rows):
        return data
    if isinstance(data, str | PathLike):
        return _from_text(Path(data), tokenizer, seq_len or DEFAULT_SEQ_LEN, seed, name)
    if isinstance(data, Tensor):
        if data.ndim != 2 or data.is_floating_point() or not len(data):
            raise ValueError(
                f"{name}={tuple(data.shape)} of {data.dtype}: must be integer token ids [n, seq] with at least one row"
            )
        return Rows(data[:, :seq_len].long(), seed=seed)
    if isinstance(data, Mapping):  # one batch, or a tokenizer's output
        data = [data]
    if not isinstance(data, Iterable):
        raise ValueError(
            f"{name}={type(data).__name__} must be token ids [n, seq], an iterable of batches, or a path to text"
        )
    return _from_batches(data, seq_len, limit, seed, name)


def _from_batches(data: Iterable[Any], seq_len: int | None, limit: ReadLimit | None, seed: int, name: str) -> Rows:
    rows = _read(data, limit, name)
    if not rows:
        raise ValueError(f"{name} holds no rows; an iterator can be read only once, so pass a new one")
    width = max(len(ids) for ids, _ in rows)
    width = width if seq_len is None else min(width, seq_len)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, (tokens, real) in enumerate(rows):
        first = int(real.argmax()) if len(tokens) > width else 0
        n = min(len(tokens) - first, width)
        ids[i, :n], mask[i, :n] = tokens[first : first + n], real[first : first + n]
    return Rows(ids, mask, seed)


def _read(data: Iterable[Any], limit: ReadLimit | None, name: str) -> list[Row]:
    rows: list[Row] = []
    tokens = 0
    for item in data:
        rows += (new := _rows_of(item, name))
        tokens += sum(int(real.sum()) for _, real in new)
        if limit is not None and len(rows) >= limit.rows and tokens >= limit.tokens:
            break
    return rows


def _rows_of(item: Any, name: str) -> list[Row]:
    """The rows of one batch (or of one example), each with its mask."""
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            raise ValueError(
                f"{name}: a batch has the keys {sorted(item)}, but not 'input_ids'; tokenize the data first"
            )
        ids = item["input_ids"]
        if isinstance(ids, list) and len(ids) > 1 and all(isinstance(one, Tensor) and one.ndim == 1 for one in ids):
            raise ValueError(
                f"{name}: input_ids is a list of tensors, which a DataLoader makes of lists by turning rows into "
                "columns; call set_format('torch') on the dataset, or stack the rows into one tensor"
            )
        rows = _rows_of_ids(ids, item.get("attention_mask"), name)
        refuse_other_meanings(item, rows, name)
        return rows
    if isinstance(item, list | tuple) and item and isinstance(item[0], Tensor) and item[0].ndim == 2:
        first, *others = item  # a DataLoader over a TensorDataset gives one-element lists
        if others:
            raise ValueError(
                f"{name}: a batch is {len(item)} tensors without names; give dicts with 'input_ids' and "
                "'attention_mask'"
            )
        item = first
    return _rows_of_ids(item, None, name)


def _rows_of_ids(ids: Any, mask: Any, name: str) -> list[Row]:
    if isinstance(ids, str):
        raise ValueError(f"{name}: a batch is the text {ids[:20]!r}; tokenize it first, or pass a path to text files")
    if isinstance(ids, list) and ids and not isinstance(ids[0], int):
        masks = [None] * len(ids) if mask is None else mask
        return [row for one, real in zip(ids, masks, strict=True) for row in _rows_of_ids(one, real, name)]
    ids = torch.as_tensor(ids)
    if ids.is_floating_point() or ids.ndim not in (1, 2):
        raise ValueError(
            f"{name}: a batch is {tuple(ids.shape)} of {ids.dtype}; it must be integer token ids [batch, seq]"
        )
    given = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
    real = zero_one_mask(given, ids, f"{name}: attention_mask")
    return list(zip(torch.atleast_2d(ids).long(), torch.atleast_2d(real), strict=True))


def _from_text(path: Path, tokenizer: Any, seq_len: int, seed: int, name: str) -> Rows:
    if tokenizer is None:
        raise ValueError(f"{name}={str(path)!r} is text: pass tokenizer= to turn it into tokens")
    if not path.exists():
        raise ValueError(f"{name}={str(path)!r} does not exist")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if _is_text(path, file))
    documents = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("tokenizer has no EOS token, which must separate documents; set tokenizer.eos_token")
    bos = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    stream = encode_documents(tokenizer, documents)
    if len(stream) < seq_len - 1:
        raise ValueError(f"{name}={str(path)!r} holds {len(stream)} tokens, fewer than one row of seq_len={seq_len}")
    return Rows(pack_rows(stream, seq_len, bos), seed=seed)


def _is_text(root: Path, file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.is_file() and not hidden and b"\0" not in file.read_bytes()[:1024]
