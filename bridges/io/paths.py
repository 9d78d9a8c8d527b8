"""One rule for what users give as a folder or a hub id."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path
from typing import Any

import huggingface_hub

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?", re.ASCII)


def local_folder(path: str | PathLike[str]) -> Path | None:
    """The folder that `path` names, `~` expanded; None where it can only be a hub id (name or owner/name).

    A folder that exists comes first: `owner/name` is looked for here, then on the hub. Raises FileNotFoundError where
    `path` neither exists nor has the form of a hub id (`~/b`, `./b`, `/a/b`, `a/b/c`), NotADirectoryError where it is a
    file.

    >>> local_folder("someone/model") is None
    True
    >>> local_folder("./no-such-folder")
    Traceback (most recent call last):
    FileNotFoundError: path='./no-such-folder' must be an existing folder or a hub id (name or owner/name)
    """
    text = str(path)
    folder = Path(text).expanduser()
    if text and folder.is_dir():
        return folder
    if text and folder.exists():
        raise NotADirectoryError(f"path={text!r} is a file; give the folder that it is in")
    if not _HUB_ID.fullmatch(text):
        raise FileNotFoundError(f"path={text!r} must be an existing folder or a hub id (name or owner/name)")
    return None


def fetch_folder(path: str | PathLike[str], **download: Any) -> Path:
    """The folder that `path` names, downloaded where it is a hub id.

    `download`: keyword arguments of `huggingface_hub.snapshot_download`. Raises OSError, in one line, where neither is
    there.
    """
    folder = local_folder(path)
    if folder is not None:
        return folder
    try:
        return Path(huggingface_hub.snapshot_download(str(path), **download))
    except (OSError, ValueError) as error:  # offline, or no such repository: the hub's message may not name it
        reason = " ".join(str(error).split())
        raise OSError(
            f"path={str(path)!r} is not a folder, and could not be downloaded from the hub: {reason}"
        ) from error
