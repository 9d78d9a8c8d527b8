"""README and the pages of docs/ say what is: their Python runs as it stands, their links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The sizes that the library chooses where a page leaves them out are for figures, and take minutes.
SMALLER_DEFAULTS = """
from bridges.channels import curves, find, measured_edits, side_effects, sweep
from bridges.config import FitConfig
chosen = FitConfig.closed_form_tokens_for
FitConfig.closed_form_tokens_for = lambda self, width: min(8 * width, chosen(self, width))
FitConfig.heldout_tokens = property(lambda self: 1024)
find.find_channels.__defaults__ = (sweep.CHOSEN_ON,) = (16,)
find.find_channels.__kwdefaults__["candidates"] = 8
curves.RANDOM_DIRECTIONS, measured_edits.SEARCH_DIRECTIONS, side_effects.PAIRS_PER_OTHER_TASK = 4, 2, 2
del curves, find, measured_edits, side_effects, sweep, FitConfig
"""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    return FENCE.findall(page.read_text(encoding="utf-8"))


@pytest.mark.slow(100)  # README fits and searches on the bundled pair
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_python_blocks_run_one_after_the_other_as_they_stand(page, tmp_path):
    script = "\n".join([SMALLER_DEFAULTS, *blocks(page)])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}
    command = [sys.executable, "-W", "error", "-c", script]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]


def test_readme_shows_running_code_on_its_first_screen():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert lines.index("```python") + 1 <= 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_are_there(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for name in re.findall(r"`((?:bridges|benchmarks|docs|configs|examples|tests)/[\w/.]*)`", text):
        assert (ROOT / name).exists(), name


def test_every_public_name_has_an_example():
    import bridges

    without = [name for name in bridges.__all__ if ">>>" not in (getattr(bridges, name).__doc__ or "")]
    assert without == ["TASKS", "__version__"]
