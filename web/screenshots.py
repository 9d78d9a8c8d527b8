"""Pictures of every view of a page, small, light and dark: python web/screenshots.py runs/demo/index.html docs/page

Needs playwright (in the dev extra) and a Chromium on the path.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

TASK, CHANNEL = "single_double_quote", "0.mlp.read.753"
VIEWS = {
    "overview": "overview",
    "bridges": "bridges",
    "tasks": "tasks",
    "task": f"task/{TASK}",
    "circuit": f"circuit/{TASK}",
    "channel": f"channel/{CHANNEL}",
}
SIZES = {"laptop": (1440, 900, 0.5), "phone": (360, 720, 1)}
"""Width and height in CSS pixels, and pixels of the picture per CSS pixel."""
TALL = {"task": 1500, "circuit": 1500}
"""Heights of views on a laptop whose plots stand further down."""


def main(page, folder):
    """Write a picture of every view, size and colour scheme."""
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for size, (width, height, scale) in SIZES.items():
            for scheme in ("light", "dark"):
                tab = browser.new_page(
                    viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=scale
                )
                for name, view in VIEWS.items():
                    tab.goto(f"{page.resolve().as_uri()}#/{view}")
                    tab.set_viewport_size(
                        {"width": width, "height": TALL.get(name, height) if size == "laptop" else height}
                    )
                    tab.wait_for_timeout(300)
                    tab.screenshot(path=folder / f"{name}-{size}-{scheme}.png")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
