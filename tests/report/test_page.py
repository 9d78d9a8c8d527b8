"""The report page's shell, read back as text; what its script does is in test_page_browser.py."""

import base64
import hashlib
import json
import re

import pytest

from bridges.report.page import render_page, write_page

DATA = {"format": 1, "title": "Two models", "tasks": [], "channels": {"a": 0.1}}


def element(page, pattern):
    """The content of the first element whose start tag matches."""
    found = re.search(f"<{pattern}>(.*?)</", page, re.DOTALL)
    assert found is not None, pattern
    return found[1]


def test_the_data_stands_in_the_page_as_it_was_given(tmp_path):
    page = write_page(DATA, tmp_path / "a" / "page.html")
    assert page == tmp_path / "a" / "page.html"
    assert json.loads(element(page.read_text(encoding="utf-8"), '(?:script)[^>]*id="data"[^>]*')) == DATA


def test_the_policy_allows_this_script_and_this_style_and_nothing_else():
    page = render_page(DATA)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None and "default-src &#39;none&#39;" in policy[1]
    style = element(page, "style")
    assert "sha256-" + base64.b64encode(hashlib.sha256(style.encode()).digest()).decode() in policy[1]
    assert "unsafe" not in policy[1] and "http" not in policy[1]


def test_no_token_ends_the_script_and_no_title_is_markup():
    tokens = ["</script>", "<!--", "&amp;", "\u2028"]
    page = render_page(DATA | {"title": "<b>bold</b>", "tokens": tokens})
    assert "<b>bold" not in page and "&lt;b&gt;bold" in page
    assert json.loads(element(page, '(?:script)[^>]*id="data"[^>]*'))["tokens"] == tokens


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_figures_that_json_cannot_hold_are_refused(value):
    with pytest.raises(ValueError, match="a figure that JSON cannot hold; give null"):
        render_page(DATA | {"loss": value})


def test_data_of_another_format_is_refused():
    with pytest.raises(ValueError, match=r"data\['format'\]=2 must be 1"):
        render_page(DATA | {"format": 2})
