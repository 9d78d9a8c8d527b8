"""Where the browser of these tests is, and the mark of tests that need it."""

import re
import shutil

import pytest

CHROMIUM = shutil.which("chromium")

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path")
"""Only a browser runs the page's script; CI fetches one where it can."""


def ends_with(address):
    """What a page's address is expected to match; `expect(page).to_have_url` waits for it, as `page.url` does not."""
    return re.compile(re.escape(address) + "$")
