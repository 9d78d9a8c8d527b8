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
from bridges.data.rows import Rows


class ReadLimit(NamedTuple):
    """Where to stop reading an iterable, which may have no end: at so many rows and so many tokens, both."""

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
        return _from_text(Path(data), tokenizer, seq_len or DEFAULT_SEQ_LEN, seed)
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
    return _from_batches(data, seq_len, limit, seed)


def _from_batches(data: Iterable[Any], seq_len: int | None, limit: ReadLimit | None, seed: int) -> Rows:
    rows = _read(data, limit)
    if not rows:
        raise ValueError("data holds no rows; an iterator can be read only once, so pass a new one")
    width = max(len(ids) for ids, _ in rows)
    width = width if seq_len is None else min(width, seq_len)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, (tokens, real) in enumerate(rows):
        first = int(real.argmax()) if len(tokens) > width else 0
        n = min(len(tokens) - first, width)
        ids[i, :n], mask[i, :n] = tokens[first : first + n], real[first : first + n]
    return Rows(ids, mask, seed)


def _read(data: Iterable[Any], limit: ReadLimit | None) -> list[tuple[Tensor, Tensor]]:
    rows: list[tuple[Tensor, Tensor]] = []
    tokens = 0
    for item in data:
        rows += (new := _rows_of(item))
        tokens += sum(len(ids) for ids, _ in new)
        if limit is not None and len(rows) >= limit.rows and tokens >= limit.tokens:
            break
    return rows


def _rows_of(item: Any) -> list[tuple[Tensor, Tensor]]:
    """The rows of one batch (or of one example), each with its mask."""
    mask = None
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            raise ValueError(f"data: a batch has the keys {sorted(item)}, but not 'input_ids'; tokenize the data first")
        item, mask = item["input_ids"], item.get("attention_mask")
        if isinstance(item, list) and len(item) > 1 and all(isinstance(one, Tensor) and one.ndim == 1 for one in item):
            raise ValueError(
                "data: input_ids is a list of tensors, which a DataLoader makes of lists by turning rows into columns; "
                "call set_format('torch') on the dataset, or stack the rows into one tensor"
            )
    elif isinstance(item, list | tuple) and item and isinstance(item[0], Tensor) and item[0].ndim == 2:
        first, *others = item  # a DataLoader over a TensorDataset gives one-element lists
        if others:
            raise ValueError(
                f"data: a batch is {len(item)} tensors without names; give dicts with 'input_ids' and 'attention_mask'"
            )
        item = first
    if isinstance(item, list) and item and not isinstance(item[0], int):
        masks = [None] * len(item) if mask is None else mask
        return [row for one, real in zip(item, masks, strict=True) for row in _rows_of(_example(one, real))]
    if isinstance(item, str):
        raise ValueError(f"data: a batch is the text {item[:20]!r}; tokenize it first, or pass a path to text files")
    ids = torch.as_tensor(item)
    if ids.is_floating_point() or ids.ndim not in (1, 2):
        raise ValueError(
            f"data: a batch is {tuple(ids.shape)} of {ids.dtype}; it must be integer token ids [batch, seq]"
        )
    real = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
    if real.shape != ids.shape:
        raise ValueError(
            f"data: attention_mask {tuple(real.shape)} must have the shape of input_ids {tuple(ids.shape)}"
        )
    return list(zip(torch.atleast_2d(ids).long(), torch.atleast_2d(real).long(), strict=True))


def _example(ids: Any, mask: Any) -> dict[str, Any]:
    return {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}


def _from_text(path: Path, tokenizer: Any, seq_len: int, seed: int) -> Rows:
    if tokenizer is None:
        raise ValueError(f"data={str(path)!r} is text: pass tokenizer= to turn it into tokens")
    if not path.exists():
        raise ValueError(f"data={str(path)!r} does not exist")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if _is_text(path, file))
    documents = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("tokenizer has no EOS token, which must separate documents; set tokenizer.eos_token")
    bos = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    stream = encode_documents(tokenizer, documents)
    if len(stream) < seq_len - 1:
        raise ValueError(f"data={str(path)!r} holds {len(stream)} tokens, fewer than one row of seq_len={seq_len}")
    return Rows(pack_rows(stream, seq_len, bos), seed=seed)


def _is_text(root: Path, file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.is_file() and not hidden and b"\0" not in file.read_bytes()[:1024]
