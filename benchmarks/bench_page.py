"""The report page with a circuit of 500 nodes and 5,000 weights, in Chromium: python benchmarks/bench_page.py

The threshold slider: milliseconds from a key press to the frame on the screen, as the browser's Event Timing says,
over `STEPS` with jumps from end to end among them, `REPEATS` times. The rest: milliseconds from an input until the
page's own thread has done its work for the frame, `ROUNDS` times. Needs playwright and a Chromium on the path.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from bridges.report.page import write_page

if TYPE_CHECKING:
    from playwright.sync_api import Page

NODES, EDGES, ROUNDS, REPEATS = 500, 5000, 15, 5
STEPS = (["End", "Home"] + 4 * ["ArrowRight"] + 3 * ["PageUp"] + ["Home"]) * 5
"""Keys on the slider: to either end, one step, a tenth of the way."""
LEAST = 16.0
"""Event Timing reports no event that took less than 16 ms, and rounds the others to 8 ms."""
WATCH = """least => {
  window.presses = [];
  new PerformanceObserver(list => {
    for (const one of list.getEntries()) if (one.name === 'keydown') presses.push(one.duration);
  }).observe({type: 'event', durationThreshold: least});
}"""
PLACES = [f"{layer}.{place}" for layer in (0, 1) for place in ("attn.read", "attn.q", "attn.k", "attn.v", "attn.write")]
PLACES += [f"{layer}.mlp.{place}" for layer in (0, 1) for place in ("read", "neuron", "write")] + ["final.read"]
TIMED = """async ([act, argument]) => {
  const start = performance.now();
  eval_(act)(argument);
  await new Promise(requestAnimationFrame);
  await new Promise(done => { const c = new MessageChannel(); c.port1.onmessage = done; c.port2.postMessage(0); });
  return performance.now() - start;
}"""
"""The message arrives once the page's thread has done its work for the frame."""
HOVER = "i => document.querySelectorAll('a.node')[i].dispatchEvent(new Event('mouseenter'))"
OPEN = "address => { location.hash = address }"
SEARCH = """text => {
  const input = document.getElementById('search');
  input.value = text;
  input.dispatchEvent(new Event('input'));
}"""


def large_circuit(nodes: int = NODES, edges: int = EDGES) -> dict[str, Any]:
    """A made-up circuit, seeded."""
    draw = random.Random(0)
    columns = sorted(draw.randrange(len(PLACES)) for _ in range(nodes))
    made: list[dict[str, Any]] = []
    for i, column in enumerate(columns):
        figures = {"order": draw.random(), "mean": draw.gauss(0, 1), "ablation": abs(draw.gauss(0, 1)), "tokens": ""}
        made.append({"id": f"{PLACES[column]}.{i}", "column": column} | figures)
    joined: list[dict[str, Any]] = []
    while len(joined) < edges:
        source, target = sorted(draw.sample(range(nodes), 2))
        if columns[source] < columns[target]:
            joined.append({"source": source, "target": target, "weight": draw.gauss(0, 0.2), "kind": "weight"})
    rest = {"ablation_by_layer": [], "attention": [], "controls": [], "verdict": [], "fresh": None, "ablated": None}
    losses = {"loss": 0.1, "loss_full_model": 0.0, "scale": 1.0, "shift": 0.0}
    places = [{"place": place, "label": place.replace(".", " ")} for place in PLACES]
    return {"task": "large", "columns": places, "nodes": made, "edges": joined} | losses | rest


def large_page() -> dict[str, Any]:
    model = {"name": "made up", "layers": 2, "width": 8, "parameters": 1, "nonzeros": None}
    no_bridges = {"tokens": 0, "nmse_tokens": None, "dense_ce": 0.0, "sparse_ce": 0.0, "kl_sparse_alone": 0.0}
    return {
        "format": 1,
        "title": "A large circuit",
        "versions": {},
        "headline": "",
        "models": {"dense": model, "sparse": model},
        "bridges": no_bridges | {"sites": [], "mean": {}},
        "text": "",
        "left_out": {},
        "tasks": [],
        "circuits": {"large": large_circuit()},
        "channels": {},
    }


def press_keys(page: Page) -> list[float]:
    """Milliseconds from each key press on the slider to the frame that shows its effect, at least `LEAST`."""
    slider = page.locator(".circuit-graph input")
    slider.focus()
    slider.press("Home")
    page.wait_for_timeout(1000)
    page.evaluate("presses.length = 0")
    for key in STEPS:
        page.keyboard.press(key)
        page.wait_for_timeout(250)
    page.wait_for_timeout(1000)
    told: list[float] = page.evaluate("presses")
    return told + [LEAST] * (len(STEPS) - len(told))


def measure_rest(page: Page) -> dict[str, list[float]]:
    """Milliseconds of the other kinds of input, over the rounds."""

    def timed(act: str, argument: object) -> float:
        return page.evaluate(TIMED.replace("eval_(act)", f"({act})"), [None, argument])

    taken: dict[str, list[float]] = {"open the circuit": []}
    for _ in range(ROUNDS):
        timed(OPEN, "#/overview")
        taken["open the circuit"].append(timed(OPEN, "#/circuit/large"))
        page.wait_for_selector("a.node")
    page.wait_for_timeout(300)
    taken["hover a node"] = [timed(HOVER, 20 * i) for i in range(ROUNDS)]
    taken["search"] = [timed(SEARCH, text) for text in ["n", "ne", "neu", "neuron 1", "377"] * 3]
    return taken


def measure(file: Path) -> tuple[list[list[float]], dict[str, list[float]]]:
    """The slider's times in each repeat, and those of the other kinds of input."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("bench_page: there is no chromium on the path; install it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.goto(f"file://{file}#/circuit/large")
        page.wait_for_selector("a.node")
        page.evaluate(WATCH, LEAST)
        slider = [press_keys(page) for _ in range(REPEATS)]
        rest = measure_rest(page)
        browser.close()
    return slider, rest


def main() -> None:
    with TemporaryDirectory() as folder:
        file = write_page(large_page(), Path(folder) / "page.html")
        print(f"{NODES} nodes, {EDGES} weights, page {file.stat().st_size / 1e3:.0f} kB\n")
        slider, rest = measure(file)
    print("| ms | median | worst |\n|---|---|---|")
    rows = {f"slider, {len(STEPS)} steps, repeat {i}": times for i, times in enumerate(slider, 1)} | rest
    for name, times in rows.items():
        print(f"| {name} | {median(times):.0f} | {max(times):.0f} |")


if __name__ == "__main__":
    main()
