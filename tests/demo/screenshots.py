"""The pictures of the page in the documents: `python -m tests.demo.screenshots --out docs/images`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from PIL import Image

from scaleweaver.commands.loading import load_pipeline
from scaleweaver.demo.page import launch
from scaleweaver.demo.studio import Studio
from tests.chromium import running_chromium

DRAWN = "#facts dd:has-text('MiB')"


def generate(page: Any) -> None:
    """A pose that was moved by hand, and the picture under it."""
    page.locator(".sw-cards button").nth(1).click()
    slot = page.locator(".sw-slot").first
    slot.get_by_text("Control 1: Pose").wait_for()
    slot.get_by_role("tab", name="Skeleton").click()
    slot.locator("select").select_option("waving")
    page.wait_for_timeout(1500)
    page.click("#draw")
    page.wait_for_selector(DRAWN)
    page.evaluate("scrollTo(0, 0); document.activeElement.blur()")
    page.mouse.move(0, 0)  # off the button


def inspect(page: Any) -> None:
    page.get_by_role("tab", name="Inspect").click()
    page.click("#draw-scales")
    page.locator("#table td").first.wait_for()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    folder = parser.parse_args().out
    opened = launch(Studio(load_pipeline("toybox")), prevent_thread_lock=True, quiet=True)
    with running_chromium() as browser:
        for name, show, size in (("demo", generate, (1240, 940)), ("demo-inspect", inspect, (1240, 860))):
            page = browser.new_page(viewport={"width": size[0], "height": size[1]})
            page.goto(opened.local_url)
            page.locator(".sw-map img:visible").first.wait_for()
            show(page)
            page.wait_for_timeout(1500)  # pictures fade in
            file = folder / f"{name}.png"
            page.screenshot(path=file)
            Image.open(file).convert("RGB").save(file, optimize=True)
            print(f"{file}: {file.stat().st_size / 1000:.0f} kB")
    opened.close(verbose=False)


if __name__ == "__main__":
    main()
