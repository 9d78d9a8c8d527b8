"""Run benchmarks and write what they print into RESULTS.md: python benchmarks/record.py bench_step.py --quick

Each benchmark has one section, found again by a comment with its command: running the command anew replaces it, all
other sections stay. Several benchmarks may be named, each followed by its own arguments. Without arguments the list of
`make bench` is run, with --gpu that of `make bench-gpu`. Where a benchmark fails its section stays as it was, the rest
are run, and the exit status is 1.

The comment has a checksum of its section's text, so that a figure changed by hand shows (tests/test_record.py).

A section gives the date, the machine (its processor and its numbers of cores and threads, its GPU if one was used;
never its name), the versions that ran and how long it took. A commit is "with changes" where a file under `SOURCES`
differed from it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple

import torch

from bridges.io.files import write_text

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "RESULTS.md"
SOURCES = ("bridges", "benchmarks", "examples", "configs", ":!benchmarks/RESULTS.md")
"""What a figure may depend on."""
BENCH = (
    "bench_step.py --quick --rounds 3",
    "bench_growth.py",
    "bench_fit.py",
    "bench_paths.py",
    "bench_abs_topk.py",
    "bench_kernels.py",
    "bench_sparse_linear.py",
    "bench_sparsity.py",
    "bench_pretrain.py --widths 1024",
    "profile_step.py",
)
"""`make bench`: under 15 minutes on two idle cores. Searches on the bundled pair, and whatever needs a browser or a
download, are recorded where they are named."""
BENCH_GPU = (
    "bench_step.py --quick --device cuda",
    "bench_step.py --gpt2 --rounds 3 --device cuda",
    "bench_abs_topk.py --device cuda",
    "profile_step.py --device cuda",
    "profile_step.py --device cuda --kind frozen --layers 4",
)
"""`make bench-gpu`: meant to take under 8 minutes; not yet measured on a GPU."""
HEAD = """# What the benchmarks measured

`python benchmarks/record.py BENCHMARK.py ARGUMENTS` runs a benchmark and writes its section, `make bench` those of its
list: no figure here is typed by hand, and the comment above each section has a checksum of its text. Ratios are of two
candidates in one run; compare those, not milliseconds of two machines. What was measured before by hand stands in
[docs/measurements.md](../docs/measurements.md).
"""
MARKER = re.compile(r"^<!-- command: (?P<command>.*?)(?:; sha256: (?P<checksum>[0-9a-f]{12}))? -->$", re.MULTILINE)
"""The comment above a section; older ones have no checksum."""
WITH_FACTS = """
import json, runpy, sys
facts, *sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    found, torch = {}, sys.modules.get("torch")
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_initialized() else None
    with open(facts, "w") as file:
        json.dump(found, file)
"""
"""Runs a script, and says at its end how many threads it computed on and whether it used a GPU."""


class FailedError(RuntimeError):
    """A benchmark ended with an error."""


def title(script: Path) -> str:
    """A benchmark's heading: the first line of its docstring, up to the command that runs it."""
    lines = (ast.get_docstring(ast.parse(script.read_text())) or script.stem).splitlines()
    return re.split(r"`?python benchmarks/", lines[0])[0].rstrip(" .:")


def run(script: Path, arguments: Sequence[str]) -> tuple[str, dict[str, Any], float]:
    """What a benchmark printed, which is shown as well; facts about its process; seconds. FailedError if it fails."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    paths = [str(script.parent), str(FOLDER), str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    started, lines = perf_counter(), []
    with TemporaryDirectory() as folder:
        facts = Path(folder) / "facts.json"
        command = [sys.executable, "-c", WITH_FACTS, str(facts), str(script), *arguments]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
        if process.returncode:
            raise FailedError(f"{script.name} ended with status {process.returncode}; its section stays as it was")
        found = json.loads(facts.read_text())
    return "".join(lines).strip(), found, perf_counter() - started


def machine(facts: dict[str, Any]) -> str:
    """The processor, cores and threads, and the GPU if one was used."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text() if cpuinfo.is_file() else "", re.MULTILINE)
    processor = named[1].strip() if named else platform.processor() or platform.machine()
    cores, threads = os.cpu_count(), facts.get("threads")
    parts = [processor, f"{cores} core{'s' * (cores != 1)}"]
    if threads is not None:
        parts.append(f"{threads} thread{'s' * (threads != 1)}")
    return ", ".join([*parts, *filter(None, [facts.get("gpu")])])


def commit() -> str:
    """The git commit, and whether `SOURCES` differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=FOLDER.parent, capture_output=True, text=True).stdout.strip()

    found = git("rev-parse", "--short=10", "HEAD")
    if not found:
        return "no commit known"
    return f"commit {found}{' with changes' if git('status', '--porcelain', '--', *SOURCES) else ''}"


def section(script: Path, arguments: Sequence[str]) -> tuple[str, str]:
    """Run a benchmark; its command, and its section with the marker."""
    command, at = shlex.join([script.name, *arguments]), commit()
    printed, facts, seconds = run(script, arguments)
    caption = (
        f"`python benchmarks/{command}`, {date.today().isoformat()}, {seconds:.0f} s. {machine(facts)}; torch "
        f"{version('torch')}; {at}."
    )
    text = f"## {title(script)}\n\n{caption}\n\n{printed}\n"
    return command, f"<!-- command: {command}; sha256: {checksum(text)} -->\n{text}"


def checksum(text: str) -> str:
    """The first 12 digits of the SHA-256 of a section's text, without the blank lines about it.

    >>> checksum("## Two figures\\n") == checksum("## Two figures")
    True
    """
    return hashlib.sha256(text.strip().encode()).hexdigest()[:12]


class Section(NamedTuple):
    """One benchmark's part of RESULTS.md."""

    whole: str
    """With its comment."""
    text: str
    """Without."""
    checksum: str | None
    """What the comment gives; None where it gives none."""


def sections(text: str) -> dict[str, Section]:
    """The sections of RESULTS.md by command, in their order."""
    found = list(MARKER.finditer(text))
    ends = [*(one.start() for one in found), len(text)][1:]
    return {
        one["command"]: Section(text[one.start() : end], text[one.end() : end], one["checksum"])
        for one, end in zip(found, ends, strict=True)
    }


def with_section(text: str, command: str, new: str) -> str:
    """The text of RESULTS.md with a section put in the place of the command's old one, or added at the end."""
    whole = {name: one.whole for name, one in sections(text).items()} | {command: new}
    return "\n".join([HEAD, *(one.rstrip() + "\n" for one in whole.values())])


def record(commands: Sequence[Sequence[str]], folder: Path = FOLDER, results: Path = RESULTS) -> int:
    """Run benchmarks of a folder and write their sections; the number of those that failed."""
    failed = 0
    for script, *arguments in commands:
        print(f"\n# python benchmarks/{shlex.join([script, *arguments])}", flush=True)
        try:
            command, new = section(folder / script, arguments)
        except FailedError as error:
            print(error, file=sys.stderr)
            failed += 1
            continue
        # Read anew each time: another process may have recorded a benchmark meanwhile.
        write_text(results, with_section(results.read_text() if results.is_file() else "", command, new))
    return failed


def split(arguments: Sequence[str]) -> list[list[str]]:
    """One list per benchmark: a name that ends in .py, and what follows it. ValueError if another word comes first.

    >>> split(["bench_step.py", "--quick", "bench_kernels.py"])
    [['bench_step.py', '--quick'], ['bench_kernels.py']]
    """
    commands: list[list[str]] = []
    for word in arguments:
        if word.endswith(".py"):
            commands.append([Path(word).name])
        elif commands:
            commands[-1].append(word)
        else:
            raise ValueError(f"{word!r} must be the name of a benchmark, which ends in .py; its arguments follow it")
    return commands


def main(arguments: Sequence[str], folder: Path = FOLDER, results: Path = RESULTS) -> int:
    """Record the benchmarks named, or one of the lists; the exit status."""
    if list(arguments) == ["--gpu"]:
        if not torch.cuda.is_available():
            print("no GPU: nothing is measured")
            return 0
        commands = [shlex.split(one) for one in BENCH_GPU]
    else:
        commands = split(arguments) or [shlex.split(one) for one in BENCH]
    started = perf_counter()
    if missing := [script for script, *_ in commands if not (folder / script).is_file()]:
        raise ValueError(f"there is no benchmark {', '.join(missing)} in {folder}")
    failed = record(commands, folder, results)
    print(f"\n{len(commands) - failed} of {len(commands)} recorded in {(perf_counter() - started) / 60:.1f} minutes")
    return 1 if failed else 0


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:2]):
        print(__doc__)
    else:
        sys.exit(main(sys.argv[1:]))
