"""The source text of Python's standard library, which every machine with Python has."""

import hashlib
import os
import sysconfig
from pathlib import Path

SPLITS = ("train", "heldout", "all")

# Installed packages, tests (absent from many distributions, some with broken syntax on purpose), tables that
# are data more than code, and text written by the build of this very interpreter.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib-dynload"}
    | {"turtledemo", "__phello__", "_bundled", "__pycache__"}
)
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
MODULES_PER_HELDOUT = 20


def python_source(split: str = "all") -> list[str]:
    """Texts of the standard library's modules, sorted by module name.

    split: "heldout" is about one module in 20, chosen by a hash of the module's name, so that a module is in the same
    split in every Python version; "train" is the others; "all" is both. Files that are not UTF-8 are left out. Raises
    ValueError for another split.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be 'train', 'heldout' or 'all'")
    files = sorted(module_files().items())
    texts = (_read(path) for name, path in files if split == "all" or is_heldout(name) == (split == "heldout"))
    return [text for text in texts if text]


def module_files() -> dict[str, Path]:
    """The file of each module that `python_source` reads, by dotted name; a package is named like `html.__init__`."""
    root, modules = Path(sysconfig.get_paths()["stdlib"]), {}
    for folder, subfolders, files in os.walk(root):
        # Pruned here rather than filtered afterwards: installed packages can be a hundred times larger.
        subfolders[:] = [name for name in subfolders if not _is_skipped(name)]
        for path in (Path(folder, name) for name in files if name.endswith(".py") and not _is_skipped(name)):
            modules[".".join(path.relative_to(root).with_suffix("").parts)] = path
    return modules


def is_heldout(module: str) -> bool:
    """Whether a module is in the held-out split, by a hash of its dotted name."""
    digest = hashlib.sha256(module.encode()).digest()
    return int.from_bytes(digest[:8], "big") % MODULES_PER_HELDOUT == 0


def _is_skipped(name: str) -> bool:
    return name in SKIPPED_FOLDERS or name.startswith(SKIPPED_PREFIXES)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return ""
