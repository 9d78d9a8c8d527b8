"""The report page in a real browser: what it shows, what it answers to, and that it asks the network for nothing."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from report.chromium import ends_with, needs_chromium
from report.page_data import CURVES, page_data

MINUS = "\N{MINUS SIGN}"
WEB = Path(__file__).parents[2] / "web"
ASSETS = Path(__file__).parents[2] / "bridges/report/assets"
VIEWS = ["overview", "bridges", "tasks", "task/quotes", "task/a_hard_one", "circuit", "circuit/quotes", "channel"]
VIEWS += ["channel/0.mlp.read.3", "channel/0.mlp.neuron.7", "nowhere"]
OPEN_AND_WAIT = """hash => new Promise(done => {
    if (location.hash === hash) return done();
    addEventListener("hashchange", done, { once: true });
    location.hash = hash;
})"""

pytestmark = [pytest.mark.slow, needs_chromium]
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_opens_and_fits_a_phone(visit, view):
    page = visit(view, width=360)
    expect(page.locator("h1")).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("view", VIEWS)
def test_a_page_without_content_says_what_is_missing(visit, view):
    page = visit(view, data="empty")
    expect(page.locator("h1")).to_have_count(1)
    named = {
        "tasks": "bridges report",
        "circuit": "bridges report",
        "channel": "bridges report",
    }
    if view in named:
        expect(page.locator(".missing code")).to_contain_text(named[view])


def test_every_link_of_every_view_leads_to_a_view(visit):
    page = visit()
    todo, seen = ["#/overview"], set()
    while todo:
        address = todo.pop()
        seen.add(address)
        page.evaluate(OPEN_AND_WAIT, address)
        expect(page.locator("h1", has_text="No such view")).to_have_count(0)
        links = page.eval_on_selector_all("a[href]", "all => all.map(a => a.getAttribute('href'))")
        todo += [link for link in set(links) - seen - set(todo) if link != "#main"]
        assert all(link.startswith("#") for link in links)
    assert {"#/bridges", "#/task/quotes", "#/circuit/quotes", "#/channel/0.mlp.read.3"} <= seen


@pytest.mark.parametrize(("typed", "view"), [("circuits", "circuit"), ("channels", "channel"), ("bridge", "bridges")])
def test_a_list_is_found_by_its_singular_and_its_plural(visit, typed, view):
    assert visit(typed).locator("main").inner_html() == visit(view).locator("main").inner_html()


def test_what_stands_between_backticks_is_code(visit):
    page = visit("task/quotes")
    expect(page.locator(".lead code")).to_have_text(["'", '"'])
    assert "`" not in page.locator(".heading").text_content()


def test_the_menu_marks_the_view_and_names_the_page(visit):
    page = visit()
    page.click("nav >> text=Tasks")
    expect(page).to_have_url(ends_with("#/tasks"))
    expect(page.locator("nav a[aria-current]")).to_have_text("Tasks")
    expect(page).to_have_title("What both models solve, and what an edit turns · A pair made by hand")
    page.click("tr:has-text('quotes') td >> nth=1")
    expect(page.locator("h1")).to_have_text("quotes")
    expect(page.locator("nav a[aria-current]")).to_have_text("Tasks")
    page.go_back()
    expect(page).to_have_url(ends_with("#/tasks"))


def test_the_overview_shows_the_headline_and_the_bridges(visit):
    page = visit()
    text = page.locator("main").text_content()
    for shown in (
        "0.012 → 0.876",
        "0.021 → 0.765",
        "random directions 0.014",
        "0.82",
        "1 of 2",
        "321 of them not zero",
    ):
        assert shown in text
    assert [bridge.text_content() for bridge in page.locator(".bridge .nmse.dense").all()] == [
        "0.31floor 0.02",
        "0.53floor 0.02",
    ]
    page.locator(".bridge").first.hover()
    expect(page.locator(".tooltip")).to_contain_text("0.311 (0.021)")


def test_figures_are_looked_up_by_their_strength_and_what_was_not_measured_is_a_dash(visit):
    page = visit(data="odd")
    headline = page.locator("section", has=page.locator("h2", has_text="Editing channel 3 at 0.mlp")).text_content()
    before = page_data()["tasks"][0]["steering"]["one"]["p_target"][1]
    assert f"{before:.3f} → –" in headline and "turns both models" not in page.locator("main").text_content()
    page = visit()
    expect(page.locator("h2", has_text="Channel 3 at 0.mlp turns both models")).to_have_count(1)


def test_undefined_figures_are_not_drawn(visit):
    page, whole = visit(data="odd"), visit()
    spans = [
        [abs(float(line.get_attribute("y2")) - float(line.get_attribute("y1"))) for line in lines]
        for lines in (page.locator(".reach.dense").all(), whole.locator(".reach.dense").all())
    ]
    assert spans[0][0] == 0 < spans[1][0] and spans[0][1:] == spans[1][1:]
    dots = [visit("bridges", data=data).locator("circle.dot").count() for data in ("odd", "full")]
    assert dots[0] == dots[1] - 2


def test_bridges_shows_every_figure_beside_its_control_and_sorts(visit):
    page = visit("bridges")
    row = page.locator("tbody tr", has_text="0.mlp").first.text_content()
    for shown in ("0.311 0.021", "0.122 1.933", "0.244 5.255", "± 0.013", "0.366 5.477", "0.911", "0.922", "8 → 32 16"):
        assert shown in row
    names = page.locator("table.sortable tbody th")
    for expected in (["final", "0.mlp", "mean"], ["0.mlp", "final", "mean"]):
        page.click("th button:has-text('NMSE encode')")
        assert names.all_text_contents() == expected
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    page.locator(".panel >> nth=0 >> .site >> nth=1").hover()
    expect(page.locator(".tooltip")).to_contain_text("0.533")
    expect(page.locator("tr.on th")).to_have_text("final")


def test_tasks_shows_what_is_solved_and_edited(visit):
    page = visit("tasks")
    full, bare = (page.locator("tbody tr", has_text=name).text_content() for name in ("quotes", "a_hard_one"))
    for shown in ("● 100% solved", "● 95% solved", "4, 3", "3 at 0.mlp", "0.88 0.01", "0.77", "0.82 0.03"):
        assert shown in full
    assert "○ 62% not solved" in bare and "not measured" in bare
    assert "my_taskits prompts are not here" in page.locator("main").text_content()


def test_a_task_shades_the_cue_and_tells_side_effects(visit):
    page = visit("task/quotes")
    assert page.locator("mark").all_text_contents() == ["('", '("']
    effects = page.locator("section", has_text="Side effects").last.text_content()
    for shown in ("0.0174,096 tokens", "0.719 unedited 0.012", "0.682", "0.083", "93% unedited 97%"):
        assert shown.replace(" ", "") in effects.replace(" ", "")
    page = visit("task/a_hard_one")
    assert "the sparse model does not solve it" in page.locator("main").text_content()


def test_a_curve_tells_its_values_and_can_be_hidden(visit):
    page = visit("task/quotes")
    plot = page.locator(".dose").first
    values = plot.locator(".dose-key td.number:not(.quiet)")

    def shown(at):
        return [f"{CURVES[name][at]:.3f}" for name in CURVES]

    assert values.all_text_contents() == shown(2)
    box = plot.locator(".hit").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 40)
    assert values.all_text_contents() == shown(1)
    plot.locator(".hit").focus()
    page.keyboard.press("Home")
    assert values.all_text_contents() == shown(0)
    assert plot.locator(".hit").get_attribute("aria-valuenow") == "0"
    curve = plot.locator("[data-curve=p_target_probe]")
    expect(curve).to_have_count(1)
    plot.locator("button", has_text="linear probe").click()
    expect(curve).to_have_count(0)
    plot.locator("button", has_text="logarithmic").click()
    assert "0.01" in plot.locator(".axis text").all_text_contents()
    expect(curve).to_have_count(0)
    plot.locator("summary").click()
    cells = plot.locator("details tr", has_text="all channels").locator("td")
    expect(cells).to_have_text(["0.012", "0.543", "0.944"])


def test_the_threshold_hides_weights_and_says_how_many(visit):
    page = visit("circuit/quotes")
    told, edges = page.locator(".circuit-graph output"), page.locator(".back-edges path:not(.stream):not([visibility])")
    expect(told).to_have_text("|weight| ≥ 0.000: 3 weights shown, 0 hidden")
    slider = page.locator("input[type=range]")
    expect(page.locator("a.node")).to_have_count(5)  # the graph is drawn once its width is known
    for value, shown in ((100, 2), (300, 1), (400, 1), (0, 3)):
        slider.fill(str(value))
        expect(edges).to_have_count(shown)
        expect(told).to_contain_text(f"{shown} weight{'s' if shown > 1 else ''} shown, {3 - shown} hidden")
    slider.fill("100")
    assert page.locator(".node.lone").get_attribute("aria-label").startswith("0.mlp.read.5")
    slider.focus()
    page.keyboard.press("Home")
    expect(edges).to_have_count(3)


def test_signs_differ_in_colour_and_in_dash(visit):
    page = visit("circuit/quotes")
    style = "(e) => [getComputedStyle(e).stroke, getComputedStyle(e).strokeDasharray]"
    negative, positive = (
        page.locator(f".back-edges .{sign}").first.evaluate(style) for sign in ("negative", "positive")
    )
    assert negative[0] != positive[0] and negative[1] != positive[1]


def test_a_node_shows_figures_and_neighbours_and_opens_its_channel(visit):
    page = visit("circuit/quotes")
    node = page.locator("a.node[aria-label^='0.mlp.read.3,']")
    node.hover()
    for shown in (f"{MINUS}0.040", "+0.662", "0, 1", "'zebra' +0.50"):
        expect(page.locator(".tooltip")).to_contain_text(shown)
    expect(page.locator(".front-edges path")).to_have_count(1)
    expect(page.locator(".node.near")).to_have_count(2)
    page.mouse.move(0, 0)
    expect(page.locator(".faded")).to_have_count(0)
    node.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#/channel/0.mlp.neuron.7"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("0.mlp.read.3")


@pytest.mark.parametrize("view", ["bridges", "tasks", "circuit", "channel"])
def test_what_a_wide_table_is_stays_in_sight_on_a_phone(visit, view):
    page = visit(view, width=360)
    table = page.locator(".scroller:has(table.sortable)")
    for scrolled in (0, 150):
        table.evaluate("(box, by) => { box.scrollLeft = by }", scrolled)
        left, right = table.locator("caption span").evaluate(
            "span => [span.getBoundingClientRect().left, span.getBoundingClientRect().right]"
        )
        assert left >= 0 and right <= 360
    heights = page.locator("tbody th a").evaluate_all("all => all.map(a => a.getBoundingClientRect().height)")
    assert all(height < 30 for height in heights), "a row's name is in one line"


def test_a_circuit_shows_controls_losses_and_attention(visit):
    page = visit("circuit/quotes")
    text = page.locator("main").text_content()
    assert "A model with permuted weights has a circuit of this size too." in text
    expect(page.locator(".as-good")).to_have_text("permuted weights3 nodes, 2 edges This counts against the circuit.")
    for shown in ("+0.662", "+0.654", "0.041", "0.465", "0.694", "98.5%", "whole model 0.012"):
        assert shown in text
    page.locator(".cell.sink").nth(1).hover()
    expect(page.locator(".tooltip")).to_contain_text("0.250")
    page.locator("label:has-text('prompt') select").select_option("double")
    page.locator(".attention summary").click()
    cells = page.locator(".attention details tbody tr").last.locator("td")
    expect(cells).to_have_text(["0.00", "0.40", "0.60"])


def test_a_channel_shows_both_signs_and_what_the_encoder_reads(visit):
    page = visit("channel/0.mlp.read.3")
    text = page.locator("main").text_content()
    for shown in ("2.13%", "+5.81", "zebra", "+0.510", "+3.91", "1.675", "2.111"):
        assert shown in text
    for shown in ("4.02", "0.520", "3.62", "0.26"):
        assert MINUS + shown in text
    assert "</script><b>" in text and " <!--" in text
    token = page.locator(".tk.at").first
    token.hover()
    expect(page.locator(".tooltip")).to_contain_text("+5.810 · encoder reads +2.905")
    unread = page.locator(".tk", has_text="cat").first
    background = "e => getComputedStyle(e).backgroundColor"
    plain = unread.evaluate(background)
    page.click("button:has-text('s reading')")
    assert unread.evaluate(background) != plain
    page.locator(".bin").nth(1).hover()
    expect(page.locator(".tooltip")).to_contain_text("40")


def test_a_node_that_was_not_looked_at_says_how_to(visit):
    page = visit("channel/final.read.9")
    expect(page.locator(".missing")).to_contain_text("bridges circuit MODEL --feature final.read.9")
    expect(page.locator("tbody a")).to_have_text("quotes")


@pytest.mark.parametrize(
    ("query", "opens"),
    [("zebra", "#/channel/0.mlp.read.3"), ("neuron 7", "#/channel/0.mlp.neuron.7"), ("hard", "#/task/a_hard_one")],
)
def test_search_from_the_keyboard(visit, query, opens):
    page = visit()
    page.keyboard.press("/")
    page.keyboard.type(query)
    expect(page.locator("#found li[aria-selected=true]")).to_have_count(1)
    page.keyboard.press("Enter")
    expect(page).to_have_url(ends_with(opens))
    expect(page.locator("#found")).to_be_hidden()


def test_search_with_arrows_and_with_nothing_found(visit):
    page = visit()
    page.keyboard.press("/")
    page.keyboard.type("quotes")
    kinds = [kind.text_content() for kind in page.locator("#found .kind").all()]
    assert kinds[:2] == ["task", "circuit"]
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page).to_have_url(ends_with("#/circuit/quotes"))
    page.fill("#search", "qqqq")
    expect(page.locator("#found")).to_have_text("Nothing is called so.")
    page.keyboard.press("Escape")
    expect(page.locator("#found")).to_be_hidden()


def test_dark_follows_the_system_until_the_button_is_pressed(visit):
    background = "getComputedStyle(document.body).backgroundColor"
    light, dark = visit(), visit(scheme="dark")
    colours = [page.evaluate(background) for page in (light, dark)]
    assert colours[0] != colours[1]
    for page, expected in ((light, colours[1]), (dark, colours[0])):
        page.click("#theme")
        assert page.evaluate(background) == expected
        page.click("#theme")
        assert page.evaluate(background) != expected


def test_the_keyboard_skips_the_menu_and_reaches_every_control(visit):
    page = visit("circuit/quotes")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    focusable = "main a:not([tabindex='-1']), main button, main input, main select, main summary, main [tabindex='0']"
    wanted = page.locator(focusable).count()
    reached = set()
    for _ in range(wanted):
        page.keyboard.press("Tab")
        mark = (
            "(e => { e.dataset.reached ??= String(Math.random()); return e.dataset.reached })(document.activeElement)"
        )
        reached.add(page.evaluate(mark))
        outline = "(s => s.outlineStyle !== 'none' || s.stroke)(getComputedStyle(document.activeElement))"
        assert page.evaluate(outline)
    assert len(reached) == wanted


def test_the_figures_can_be_downloaded(visit):
    page = visit()
    with page.expect_download() as download:
        page.click("#download")
    assert json.loads(Path(download.value.path()).read_text()) == page_data()


def test_scripts_of_others_do_not_run(visit, files, tmp_path, browser):
    changed = tmp_path / "changed.html"
    changed.write_text(files["full"].read_text().replace("</main>", "<script>document.title = 'ran'</script></main>"))
    page = browser.new_page()
    page.goto(f"file://{changed}")
    assert page.title() != "ran"
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(visit, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    for data, views in (("full", VIEWS), ("empty", ["overview", "circuit/quotes"])):
        page = visit(data=data, scheme=scheme)
        for view in views:
            page.evaluate("hash => { location.hash = hash }", f"#/{view}")
            page.wait_for_timeout(50)
            page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
            found = axe.run(page).response["violations"]
            serious = [
                (one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")
            ]
            assert serious == [], view


@pytest.mark.skipif(
    not (WEB / "node_modules").is_dir() or not shutil.which("node"), reason="no node, or no node_modules"
)
def test_the_bundle_is_what_its_sources_build(tmp_path):
    environment = os.environ | {"BRIDGES_PAGE_OUT": str(tmp_path)}
    subprocess.run(["node", "build.mjs"], cwd=WEB, env=environment, check=True, capture_output=True)
    for name in ("page.js", "page.css"):
        assert (tmp_path / name).read_bytes() == (ASSETS / name).read_bytes()
    assert len((ASSETS / "page.js").read_bytes()) < 150_000
    lock = json.loads((WEB / "package-lock.json").read_text())
    assert not any("resolved" in package for package in lock["packages"].values())
