"""The threshold of a circuit with more weights than dashes can tell apart: what is hidden, and what is drawn anew."""

import pytest
from report.chromium import needs_chromium
from report.page_data import crowded_circuit

pytestmark = [pytest.mark.slow, needs_chromium]
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect

STEPS, DASHED = 400, 600
PICTURE = """() => {
  const shown = [];
  for (const path of document.querySelectorAll('.under:not(.off) path:not(.stream):not([visibility=hidden])')) {
    const style = getComputedStyle(path);
    for (const piece of path.getAttribute('d').split('M').slice(1)) {
      shown.push([piece, style.stroke, style.strokeDasharray, style.strokeWidth].join(' '));
    }
  }
  const lone = [...document.querySelectorAll('a.node.lone')].map(node => node.getAttribute('href'));
  return {shown: shown.sort(), lone, told: document.querySelector('.circuit-graph output').textContent};
}"""
SLIDE = """value => {
  const slider = document.querySelector('.circuit-graph input');
  slider.value = value;
  slider.dispatchEvent(new Event('input'));
}"""
VALUES = [400, 0, 1, 2, 3, 90, 91, 60, 250, 160, 140, 399, 400, 10, 200, 0, 130, 5]
"""From end to end, step by step, and across the size at which dashes begin."""


@pytest.fixture(scope="module")
def circuit():
    return crowded_circuit()


def expected(circuit, value):
    """The weights at least as large as the threshold, and the nodes left without one."""
    weights = [edge for edge in circuit["edges"] if edge["kind"] == "weight"]
    least = value / STEPS * max(abs(edge["weight"]) for edge in weights)
    shown = [edge for edge in weights if abs(edge["weight"]) >= least - 1e-12]
    ends = {edge[end] for edge in shown for end in ("source", "target")}
    return len(shown), len(weights) - len(shown), len(circuit["nodes"]) - len(ends)


def test_the_picture_after_the_slider_is_the_one_drawn_anew(visit, circuit):
    page = visit("circuit/crowded", data="crowded")
    page.wait_for_selector("a.node")
    for value in VALUES:
        page.evaluate(SLIDE, value)
        moved, seen = page.evaluate(PICTURE), page.locator(".layers").screenshot()
        # Another width draws the graph anew, at the threshold where the slider stands.
        page.set_viewport_size({"width": 1000, "height": 900})
        page.wait_for_function("() => document.querySelector('.layers svg').getAttribute('width') < 1000")
        page.set_viewport_size({"width": 1280, "height": 900})
        page.wait_for_function("() => document.querySelector('.layers svg').getAttribute('width') > 1000")
        assert page.evaluate(PICTURE) == moved, value
        assert page.locator(".layers").screenshot() == seen, value
        shown, hidden, lone = expected(circuit, value)
        assert (len(moved["shown"]), len(moved["lone"])) == (shown, lone)
        assert f"{shown:,} weight{'s' if shown != 1 else ''} shown, {hidden:,} hidden" in moved["told"]


def test_negative_weights_are_dashed_where_few_enough_are_shown(visit, circuit):
    page = visit("circuit/crowded", data="crowded")
    page.wait_for_selector("a.node")
    dashed = {}
    for value in VALUES:
        page.evaluate(SLIDE, value)
        picture = page.evaluate(PICTURE)["shown"]
        dashed[len(picture)] = any("6px, 4px" in line for line in picture)
    assert {shown > DASHED for shown in dashed} == {True, False}
    assert all(is_dashed == (shown <= DASHED) for shown, is_dashed in dashed.items() if shown > 1)


@pytest.mark.parametrize("scale", [1, 1.4])
def test_the_pointer_near_a_line_tells_its_weight(visit, scale):
    page = visit("circuit/quotes")
    page.wait_for_selector("a.node")
    if scale != 1:
        page.click("button[aria-label='Zoom in']")
        page.wait_for_timeout(400)
    place = """path => {
      const at = path.getPointAtLength(0.8 * path.getTotalLength());
      const {x, y} = at.matrixTransform(path.getScreenCTM());
      return [x, y];
    }"""
    for sign, words in (("negative", "0.mlp.read.3 → 0.mlp.neuron.7weight\N{MINUS SIGN}0.520"), ("positive", "+0.080")):
        page.locator(".circuit-graph").scroll_into_view_if_needed()
        x, y = page.locator(f".under .{sign}").first.evaluate(place)
        page.mouse.move(x, y + 2)
        assert words in page.locator(".tooltip").text_content()
        expect(page.locator(".front-edges path")).to_have_count(1)
        page.mouse.move(x, y + 300)
        assert page.locator(".front-edges path").count() == 0 and page.locator(".tooltip").is_hidden()
