"""The report in Chromium: nothing is fetched, nothing fails, and a person can read all of it.

Pictures of the page are kept in ``test-output/``, or where TEST_OUTPUT says.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from diffusion_engines.config import Lora
from diffusion_engines.parity.scorers import Scores
from diffusion_engines.report.page import write_report
from tests.browser.devtools import Page, browser
from tests.conftest import ROOT
from tests.reports import PYTORCH, make_fleet, write_generated

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium"),
]
CHECKS = (Path(__file__).parent / "page.js").read_text()
WIDE, NARROW = 1200, 420
# https://www.w3.org/TR/WCAG22/#contrast-minimum
LOWEST_CONTRAST = 4.5


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page that has everything: two measured targets, misses, quantized graphs, scores."""
    made = make_fleet(
        tmp_path_factory.mktemp("fleet"),
        {
            "cpu-text_encoder": "fp32",
            "cpu-unet": "fp32",
            "cpu-vae_decoder": "fp32",
            "a10-unet": "fp16",
            "h100-unet": "int8",
        },
        ("cpu", "a10"),
        rel_l2=3e-4,
        gpus=("NVIDIA A10", "NVIDIA A10"),
        quantized={"unet-int8": "fp16"},
        errors=(0.02, 0.03, 0.2, 0.02, 0.03, 0.04),
        scores={"lpips": Scores((0.0, 0.0123)), "clip": Scores((27.5, 31.25), (27.25, 31.0))},
        baselines={
            "eager": PYTORCH,
            "compiled": replace(PYTORCH, compile="max-autotune", channels_last=True),
        },
    )
    for target in ("cpu", "a10"):
        write_generated(made.workspace, target, 5, animated=True)
    model = replace(made.arguments["model"], loras=[Lora("ink.safetensors", 0.8)])
    write_report(made.workspace, made.folder, **(made.arguments | {"model": model}))
    return made.folder / "index.html"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert CHROMIUM is not None
    with browser(CHROMIUM, tmp_path_factory.mktemp("chromium") / "profile") as page:
        yield page


@pytest.fixture
def page(tab: Page, report: Path) -> Page:
    return opened(tab, report)


def opened(tab: Page, path: Path) -> Page:
    tab.resize(WIDE)
    tab.prefer(color_scheme="light", reduced_motion="no-preference")
    tab.open(path.as_uri())
    tab.evaluate(CHECKS)
    return tab


def requests(page: Page) -> list[str]:
    return [
        params["request"]["url"]
        for method, params in page.events
        if method == "Network.requestWillBeSent"
    ]


def complaints(page: Page) -> list[str]:
    kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    return [f"{method}: {params}" for method, params in page.events if method in kinds]


def moves(page: Page, element: str) -> bool:
    """Whether an element looks different within three seconds."""
    box = page.evaluate(f"boxOf({element})")
    first, deadline = page.screenshot(box), time.monotonic() + 3
    while time.monotonic() < deadline:
        if page.screenshot(box) != first:
            return True
    return False


def keep_picture(page: Page, name: str) -> None:
    folder = Path(os.environ.get("TEST_OUTPUT", ROOT / "test-output"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(page.screenshot())


def test_nothing_is_fetched_and_nothing_complains(page: Page) -> None:
    found = requests(page)
    assert found[0].startswith("file:")
    assert [url[:80] for url in found[1:] if not url.startswith("data:")] == []
    assert complaints(page) == []
    keep_picture(page, "report.png")


def test_every_picture_decodes(page: Page) -> None:
    assert page.evaluate("document.images.length") > 20
    assert page.evaluate("brokenPictures()") == []


def test_the_checks_see_a_page_that_is_wrong(tab: Page, tmp_path: Path) -> None:
    path = tmp_path / "wrong.html"
    path.write_text(
        "<!doctype html><main><p style='width: 3000px; color: #999; background: #fff'>pale</p>"
        "<img src='http://127.0.0.1:9/none.png' alt='gone'>"
        "<img src='data:image/png;base64,AAAA' alt='broken'>"
        "<div class='scroll' style='overflow: hidden; width: 90px; direction: rtl'>"
        "<p style='width: 3000px'>hidden</p></div>"
        "<script>console.log('hello')</script></main>"
    )
    page = opened(tab, path)
    assert "http://127.0.0.1:9/none.png" in requests(page)
    assert any("hello" in text for text in complaints(page))
    assert page.evaluate("brokenPictures()") == ["gone", "broken"]
    assert page.evaluate("wideElements().length") > 0
    assert page.evaluate("scrollers()") == [False]
    assert page.evaluate("lowestContrast().ratio") < LOWEST_CONTRAST
    assert not moves(page, "document.images[1]")


def test_the_animations_move_and_rest_for_who_wants_no_motion(page: Page) -> None:
    gifs = "[...document.images].filter(i => i.currentSrc.startsWith('data:image/gif'))"
    count = page.evaluate(f"{gifs}.length")
    assert count == 7  # three images of each target, and the reference
    for index in range(count):
        assert moves(page, f"{gifs}[{index}]"), index
    page.prefer(reduced_motion="reduce")
    deadline = time.monotonic() + 3
    while moving := page.evaluate(f"{gifs}.length"):  # it chooses other pictures a little later
        assert time.monotonic() < deadline, moving


def test_tables_are_readable_on_a_narrow_screen(page: Page) -> None:
    page.resize(NARROW)
    assert page.evaluate("wideElements()") == []
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW
    reached = page.evaluate("scrollers()")
    assert reached
    assert all(reached)
    assert page.evaluate("smallestTableText()") >= 12
    keep_picture(page, "report-narrow.png")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(page: Page, scheme: str) -> None:
    page.prefer(color_scheme=scheme)
    dark = page.evaluate("luminance(background(document.body)) < 0.05")
    assert dark is (scheme == "dark")
    found = page.evaluate("lowestContrast()")
    assert found["ratio"] >= LOWEST_CONTRAST, found
    if dark:
        keep_picture(page, "report-dark.png")


def test_each_summary_opens(page: Page) -> None:
    count = page.evaluate("document.querySelectorAll('summary').length")
    assert count == 10  # five engines, four graphs, one stage
    for index in range(count):
        element = f"document.querySelectorAll('summary')[{index}]"
        place = page.evaluate(f"middleOf({element})")
        page.click(place["x"], place["y"])
        assert page.evaluate(f"{element}.parentElement.open"), index
    assert page.evaluate("wideElements()") == []
    keep_picture(page, "report-open.png")
