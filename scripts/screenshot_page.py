"""Take docs/page.png: the page of a running `minidsv serve`, after its ready example.

    minidsv serve &
    python scripts/screenshot_page.py --url http://localhost:8000 --out docs/page.png

Needs the extra `browser` and a Chromium on the PATH.
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright


def main() -> None:
    """Parse, run the example, point at its first token and at a cell, and save the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--out", type=Path, default=Path("docs/page.png"))
    options = parser.parse_args()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page(viewport={"width": 1180, "height": 900}, color_scheme="light")
        page.goto(options.url)
        page.click("#run")
        page.locator("#run:enabled").wait_for()
        page.locator("#output .token").first.hover()
        box = page.locator("#strip").bounding_box()
        assert box is not None, "the server reported no selection"
        page.mouse.move(box["x"] + box["width"] * 0.074, box["y"] + box["height"] * 0.35)
        page.screenshot(path=options.out, full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
