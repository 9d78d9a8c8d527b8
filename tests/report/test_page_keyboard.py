"""Every view of the report page can be reached and left by the keyboard alone."""

import pytest
from report.chromium import ends_with, needs_chromium

pytestmark = [pytest.mark.slow, needs_chromium]
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect
MOST_TABS = 60


def tab_to(page, text):
    """Press Tab until the element with this text, or whose name begins with it, has the focus."""
    focused = "[document.activeElement.textContent.trim(), document.activeElement.getAttribute('aria-label') ?? '']"
    for _ in range(MOST_TABS):
        page.keyboard.press("Tab")
        content, label = page.evaluate(focused)
        if content == text or label.startswith(text):
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            return outline
    raise AssertionError(f"{text!r} never had the focus")


@pytest.mark.parametrize("name", ["Overview", "Bridges", "Tasks", "Circuits", "Channels"])
def test_every_menu_entry_by_tab_and_enter(visit, name):
    page = visit("channel/0.mlp.neuron.7")
    assert tab_to(page, name) != "none", "the focus is not seen"
    page.keyboard.press("Enter")
    expect(page.locator("nav a[aria-current]")).to_have_text(name)
    expect(page.locator("h1")).to_be_focused()


@pytest.mark.parametrize(
    ("start", "link", "address"),
    [
        ("tasks", "quotes", "#/task/quotes"),
        ("circuit", "quotes", "#/circuit/quotes"),
        ("channel", "0.mlp.read.3", "#/channel/0.mlp.read.3"),
        ("task/quotes", "4 nodes, 3 weights", "#/circuit/quotes"),
        ("circuit/quotes", "The task", "#/task/quotes"),
    ],
)
def test_what_a_view_leads_to_by_tab_and_enter(visit, start, link, address):
    page = visit(start)
    tab_to(page, link)
    page.keyboard.press("Enter")
    expect(page).to_have_url(ends_with(address))
