"""The page in a real browser: what a visitor does, and sees change."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_pipeline import tiny_pipeline

from scaleweaver.controls.openpose import from_json
from scaleweaver.demo.encoded import decode
from scaleweaver.demo.page import launch
from scaleweaver.demo.studio import Studio
from scaleweaver.metadata import read_settings

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "demo" / "examples"
SECONDS = 60_000  # milliseconds that anything may take on a busy machine
PICTURE, FACTS = "#pictures img", "#facts dd:has-text('MiB')"


class Visit:
    """A page that is open, with what went wrong in it."""

    def __init__(self, context: Any, address: str) -> None:
        self.context, self.address = context, address
        self.page = context.new_page()
        self.problems: list[str] = []
        self.asked: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda said: self.problems.append(said.text) if said.type == "error" else None)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)
        self.page.wait_for_selector("#draw")
        self.slot = self.page.locator(".sw-slot").first
        self.wait_for_map()

    def leave(self) -> None:
        """Close it; nothing broke in it, and no other site was asked."""
        self.page.close()
        assert not self.problems
        assert any(url.endswith(".js") for url in self.asked)  # it did ask for what it is made of
        strangers = [url for url in self.asked if not url.startswith((self.address, "data:", "blob:"))]
        assert not strangers

    def picture(self, selector: str) -> Any:
        """(H, W, 3) of what a picture of the page shows."""
        source = self.page.locator(selector).first.get_attribute("src")
        return np.asarray(Image.open(io.BytesIO(self.context.request.get(source).body())).convert("RGB"))

    def wait_for_map(self) -> Any:
        self.slot.locator(".sw-map img:visible").last.wait_for()

    def map(self, other_than: Any = None) -> Any:
        """What the model reads, once it is another one."""
        selector = ".sw-slot >> nth=0 >> .sw-source > div:last-child .sw-map img"
        for _ in range(SECONDS // 100):
            if self.page.locator(selector).count():
                shown = self.picture(selector)
                if other_than is None or not np.array_equal(shown, other_than):
                    return shown
            self.page.wait_for_timeout(100)
        raise AssertionError("the map stayed as it was")

    def draw(self) -> Any:
        """Press the button; the picture at the end."""
        self.page.evaluate("document.querySelector('#facts').querySelector('dl')?.remove()")
        self.page.click("#draw")
        self.page.wait_for_selector(FACTS)
        self.page.wait_for_selector("#draw:visible")
        return self.picture(PICTURE)


def remove(where: Any) -> None:
    """Take the picture out of an input."""
    where.get_by_label("Remove Image").or_(where.get_by_label("Clear")).first.click()


def context_of(browser: Any, **options: Any) -> Any:
    made = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    made.set_default_timeout(SECONDS)
    return made


@pytest.fixture(scope="module")
def desk(browser: Any) -> Iterator[Any]:
    """A browser's window, which keeps what the page is made of for the next visit."""
    opened = context_of(browser)
    yield opened
    opened.close()


@pytest.fixture
def visit(desk: Any, address: str) -> Iterator[Visit]:
    """A visitor of the fresh page, once a test: tests may run in any order, in several processes."""
    opened = Visit(desk, address)
    yield opened
    opened.leave()


def test_the_first_picture_is_one_press_away(visit: Visit, toybox: Any) -> None:
    picture = visit.draw()
    assert picture.shape == (128, 128, 3)
    same = toybox("a large red rocket on grass at noon", seed=7, control={"canny": Image.fromarray(visit.map())})
    assert np.array_equal(picture, same.images[0])
    page = visit.page
    assert page.locator("#scales .sw-strip img").count() == 6
    assert page.locator("#slider img").count() == 2
    page.get_by_text("The Python for this picture").click()
    code = page.locator("#python .cm-content")
    code.wait_for()
    assert "VARControlPipeline.from_pretrained" in code.inner_text() and "seed=7" in code.inner_text()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download PNG").click()
    assert download.value.suggested_filename == "a-large-red-rocket-on-grass-at-noon-7.png"
    assert read_settings(download.value.path())["seed"] == 7


def test_other_words_draw_another_picture(visit: Visit) -> None:
    before = visit.draw()
    visit.page.fill("#prompt textarea", "a large blue rocket on snow at night")
    after = visit.draw()
    assert after[:40].mean() < before[:40].mean() - 40  # the sky of a night


def test_an_example_brings_words_and_control(visit: Visit) -> None:
    before = visit.map()
    visit.page.locator(".sw-cards button").nth(1).click()
    visit.map(other_than=before)
    assert "waving" in visit.page.input_value("#prompt textarea")
    assert "Pose" in visit.slot.inner_text()


def test_a_joint_moves_by_mouse_and_by_keys(visit: Visit, tmp_path: Path) -> None:
    edges = visit.map()
    visit.slot.get_by_role("tab", name="Skeleton").click()
    waving = visit.map(other_than=edges)
    visit.slot.locator("select").select_option("standing")
    standing = visit.map(other_than=waving)
    wrist = visit.slot.locator('circle[data-joint="4"]')
    box = wrist.bounding_box()
    visit.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    visit.page.mouse.down()
    visit.page.mouse.move(box["x"] - 40, box["y"] - 60, steps=3)
    visit.page.mouse.up()
    moved = visit.map(other_than=standing)
    wrist.focus()
    for _ in range(4):
        visit.page.keyboard.press("Shift+ArrowUp")
    visit.map(other_than=moved)
    visit.slot.locator('circle[data-joint="10"]').focus()
    visit.page.keyboard.press("Delete")
    with visit.page.expect_download() as download:
        visit.slot.get_by_role("button", name="Save JSON").click()
    points, size = from_json(json.loads(Path(download.value.path()).read_text()))
    assert size == (128, 128) and points.shape == (1, 18, 3)
    assert points[0, 4, 1] < points[0, 2, 1] - 10 and points[0, 10, 2] == 0


def test_a_sketch_becomes_the_map(visit: Visit) -> None:
    before = visit.map()
    visit.slot.get_by_role("tab", name="Sketch").click()
    canvas = visit.slot.locator("canvas.sw-board:visible").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    at = lambda x, y: (box["x"] + x * box["width"], box["y"] + y * box["height"])  # noqa: E731
    visit.page.mouse.move(*at(0.3, 0.8))
    visit.page.mouse.down()
    for corner in ((0.5, 0.2), (0.7, 0.8), (0.3, 0.8)):
        visit.page.mouse.move(*at(*corner), steps=3)
    visit.page.mouse.up()
    for _ in range(SECONDS // 100):
        levels = visit.map(other_than=before)
        if levels[100:104, 50:80].max() == 255:
            break
        visit.page.wait_for_timeout(100)
    assert set(np.unique(levels)) == {0, 255} and levels[102, 40:88].any() and not levels[:20].any()
    visit.page.fill("#prompt textarea", "a large pink cone on sand in the morning")
    assert visit.draw().shape == (128, 128, 3)


def test_a_photo_of_ones_own_becomes_a_map(visit: Visit) -> None:
    before = visit.map()
    visit.slot.get_by_role("tab", name="Photo").click()
    remove(visit.slot)
    visit.slot.locator("input[type=file]").first.set_input_files(EXAMPLES / "house.png")
    assert visit.map(other_than=before).any()


def test_a_refusal_shows_in_the_page_and_the_button_comes_back(visit: Visit) -> None:
    visit.page.fill("#prompt textarea", "")
    visit.page.click("#draw")
    visit.page.get_by_text("The prompt is empty; write what to draw").wait_for()
    visit.page.wait_for_selector("#draw:visible")
    visit.page.get_by_test_id("toast-close").click()
    visit.page.fill("#prompt textarea", "a red mushroom on stone at dawn")


def test_what_a_file_says_is_shown_as_text(visit: Visit, tmp_path: Path) -> None:
    (tmp_path / "pose.json").write_text('{"<img src=x> & more": 1}')
    visit.slot.get_by_role("tab", name="Skeleton").click()
    visit.slot.locator("input[type=file][accept*=json]").set_input_files(tmp_path / "pose.json")
    visit.page.get_by_text("<img src=x> & more").wait_for()
    visit.slot.get_by_role("tab", name="Photo").click()


def test_stop_ends_a_drawing_that_waits(visit: Visit, studio: Any) -> None:
    with studio._turn:  # as if another one was drawn
        visit.page.click("#draw")
        visit.page.click("#stop")
        visit.page.wait_for_selector("#draw:visible")
    visit.draw()


def test_two_settings_side_by_side(visit: Visit) -> None:
    visit.page.get_by_role("tab", name="Compare").click()
    visit.page.click("#draw-both")
    visit.page.get_by_text("mean difference").wait_for()
    a, b = (visit.picture(f"#both img >> nth={i}") for i in (0, 1))
    assert a.shape == b.shape == (128, 128, 3) and not np.array_equal(a, b)


def test_a_picture_tells_its_settings_and_its_scales(visit: Visit, toybox: Any, tmp_path: Path) -> None:
    page = visit.page
    page.get_by_role("tab", name="Inspect").click()
    toybox("a green cactus on dirt at sunset", seed=11).images[0].save(tmp_path / "cactus.png")
    page.locator("#dropped input[type=file]").set_input_files(tmp_path / "cactus.png")
    page.locator("#settings").get_by_text("a green cactus on dirt at sunset").first.wait_for()
    page.click("#draw-scales")
    page.locator("#table td").first.wait_for()
    rows = page.locator("#table tbody tr")
    assert rows.count() == 6 and rows.last.locator("td").last.inner_text() == "equal"
    last = page.locator("#after img").last.get_attribute("src")
    with Image.open(tmp_path / "cactus.png") as drawn:
        assert np.array_equal(decode(last, "frame", most_pixels=10**6), drawn.convert("RGB"))
    (tmp_path / "plain.png").write_bytes((EXAMPLES / "house.png").read_bytes())
    remove(page.locator("#dropped"))
    page.locator("#dropped input[type=file]").set_input_files(tmp_path / "plain.png")
    page.get_by_text("carries no settings").first.wait_for()


def test_a_phone_scrolls_down_and_never_sideways(browser: Any, address: str) -> None:
    window = context_of(browser, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    phone = Visit(window, address)
    phone.draw()
    phone.page.wait_for_function("document.querySelector('#pictures').getBoundingClientRect().top < innerHeight / 2")
    for tab in ("Generate", "Compare", "Inspect"):
        phone.page.get_by_role("tab", name=tab).click()
        assert phone.page.evaluate("document.documentElement.scrollWidth") == 390
    phone.leave()
    window.close()


def test_dark_follows_the_visitor_and_the_button(browser: Any, address: str) -> None:
    window = context_of(browser, color_scheme="dark")
    night = Visit(window, address)
    channels = "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).slice(0, 3)"
    ground = f"{channels}.map(Number).reduce((a, b) => a + b)"
    assert night.page.evaluate(ground) < 120
    night.page.get_by_role("button", name="Light / dark").click()
    night.page.wait_for_function(f"{ground} > 600")
    night.leave()
    window.close()


# text whose contrast to what lies below it is under that of WCAG's AA; text on pictures is left out
FAINT = r"""() => {
  const numbers = (colour) => colour.match(/[0-9.]+/g).map(Number);
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = (colour) => colour.map((c) => linear(c / 255))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const faint = [];
  let seen = 0;
  for (const element of document.querySelectorAll(".gradio-container *")) {
    const text = [...element.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data.trim()).join("");
    const shown = element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
    if (!shown || !/[\p{L}\p{N}]/u.test(text)) continue;
    let ground = null, opacity = 1, pictured = false;
    for (let node = element; node && !ground; node = node.parentElement) {
      const style = getComputedStyle(node);
      const [r, g, b, alpha = 1] = numbers(style.backgroundColor);
      pictured ||= style.backgroundImage !== "none";
      opacity *= Number(style.opacity);
      if (alpha > 0.5) ground = [r, g, b];
    }
    if (pictured || !ground) continue;
    const style = getComputedStyle(element);
    const [r, g, b, alpha = 1] = numbers(style.color);
    const ink = [r, g, b].map((c, i) => c * alpha * opacity + ground[i] * (1 - alpha * opacity));
    const [high, low] = [light(ink), light(ground)].sort((one, other) => other - one);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    seen += 1;
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < (large ? 3 : 4.5)) faint.push(`${text.slice(0, 40)}: ${contrast.toFixed(2)}`);
  }
  return { seen, faint };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(browser: Any, address: str, scheme: str) -> None:
    window = context_of(browser, color_scheme=scheme, reduced_motion="reduce")
    visitor = Visit(window, address)
    visitor.draw()
    for tab in ("Generate", "Compare", "Inspect"):
        visitor.page.get_by_role("tab", name=tab).click()
        visitor.page.wait_for_timeout(300)
        found = visitor.page.evaluate(FAINT)
        assert found["seen"] > 15 and not found["faint"]
    visitor.leave()
    window.close()


def test_another_size_changes_the_map_and_the_sheets(desk: Any, address: str) -> None:
    studio = Studio(tiny_pipeline("canny", "pose", schedule={"family": "infinity", "budget": "0.06M"}))
    name, (height, width) = next(each for each in studio.sizes.items() if each[1][1] == 2 * each[1][0])
    opened = launch(studio, prevent_thread_lock=True, quiet=True)
    visitor = Visit(desk, opened.local_url)
    before = visitor.map()
    visitor.page.get_by_text("More settings").click()
    visitor.page.get_by_label("Size", exact=True).click()
    visitor.page.get_by_role("option", name=name, exact=True).click()
    assert before.shape == (256, 256, 3) and visitor.map(other_than=before).shape == (height, width, 3)
    visitor.slot.get_by_role("tab", name="Skeleton").click()
    board = visitor.slot.locator("svg.sw-board:visible")
    board.wait_for()
    assert board.get_attribute("viewBox") == f"0 0 {width} {height}"
    visitor.slot.get_by_role("tab", name="Sketch").click()
    canvas = visitor.slot.locator("canvas.sw-board:visible").first
    canvas.wait_for()
    assert canvas.evaluate("(canvas) => canvas.width / canvas.height") == 2
    visitor.leave()
    opened.close(verbose=False)
