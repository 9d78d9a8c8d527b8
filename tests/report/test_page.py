"""The report page as text; test_page_browser.py reads it in a browser."""

import json
import re
from base64 import b64encode
from hashlib import sha256

import pytest
from report.page_data import page_data

from bridges.report.page import render_page, write_page


def element(page, opening):
    return re.search(rf"{opening}>(.*?)</(?:script|style)>", page, re.DOTALL)[1]


def test_the_data_in_the_page_is_the_data():
    data = page_data()
    assert json.loads(element(render_page(data), '<script type="application/json" id="data"')) == data


def test_no_text_of_the_data_is_markup():
    data = page_data() | {"title": "</title><b>bold</b>"}
    page = render_page(data)
    assert "</script><b>" in json.dumps(data) and "</script><b>" not in page and "<!--" not in page
    assert "<b>bold" not in page and "&lt;b&gt;bold" in page


def test_the_policy_allows_this_script_and_this_style_alone():
    page = render_page(page_data())
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', page)[1].replace("&#39;", "'")
    script, style = (
        b64encode(sha256(element(page, f"<{name}").encode()).digest()).decode() for name in ("script", "style")
    )
    expected = f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'"
    assert policy == expected
    assert not re.search(r"\sstyle=", page.split("<body>")[1].split("<script")[0])


def test_what_json_cannot_hold_is_refused(tmp_path):
    data = page_data()
    data["bridges"]["dense_ce"] = float("nan")
    with pytest.raises(ValueError, match="give null in its place"):
        render_page(data)
    with pytest.raises(ValueError, match="must be 1"):
        render_page(page_data() | {"format": 2})


def test_the_page_is_written_where_it_is_told(tmp_path):
    path = write_page(page_data(), tmp_path / "report.html")
    assert path == tmp_path / "report.html" and path.read_text(encoding="utf-8") == render_page(page_data())
