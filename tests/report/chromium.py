"""Where the browser of these tests is, and the mark of tests that need it."""

import shutil

import pytest

CHROMIUM = shutil.which("chromium")

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path")
"""Only a browser runs the page's script; CI fetches one where it can."""
