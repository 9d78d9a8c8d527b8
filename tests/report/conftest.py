"""The report page in a real browser, for the tests that open it."""

import pytest
from report.chromium import CHROMIUM
from report.page_data import crowded_page_data, empty_page_data, odd_page_data, page_data

from bridges.report.page import write_page


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return {name: write_page(data(), folder / f"{name}.html") for name, data in DATA.items()}


DATA = {"full": page_data, "empty": empty_page_data, "odd": odd_page_data, "crowded": crowded_page_data}


@pytest.fixture
def visit(browser, files):
    """A function that opens a view; afterwards: no error was told, and nothing but files was asked for."""
    told, asked, contexts = [], [], []

    def open_view(view="overview", data="full", width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: told.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"file://{files[data]}#/{view}")
        return page

    yield open_view
    for context in contexts:
        context.close()
    assert told == []
    assert {url.split(":")[0] for url in asked} <= {"file", "blob"}
