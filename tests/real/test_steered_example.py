"""The example on a real model does what its page says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
SEA = re.compile(r"\b(sea|ocean|sail|ship|wave|fish|whale|boat|tide|beach|coral)")


def test_the_sea_comes_into_the_steered_answers_alone(folder):
    command = [sys.executable, str(ROOT / "examples" / "steer_smollm2.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    _report, *parts = done.stdout.split("\n\n")
    heads, answers = zip(*(part.split("\n", 1) for part in parts), strict=True)
    assert [head.split(":")[0] for head in heads] == ["unsteered", "the sea", "a random direction of that norm"]
    words = [len(set(SEA.findall(answer.lower()))) for answer in answers]
    assert words[0] == words[2] == 0 and words[1] >= 2
    kl = [float(head.split()[-4]) for head in heads]
    assert kl[0] == 0 and 0 < kl[1] < 1 and 0 < kl[2] < 1
