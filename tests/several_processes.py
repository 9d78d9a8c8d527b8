"""Runs of `separate_runs.py` in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def separately(*arguments, **variables):
    """Start `separate_runs.py` in a process of its own."""
    path = f"{TESTS}{os.pathsep}{TESTS.parent}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}
    command = [sys.executable, str(TESTS / "separate_runs.py"), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finished(*processes):
    """Wait for processes; the standard error of one that fails is shown."""
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
