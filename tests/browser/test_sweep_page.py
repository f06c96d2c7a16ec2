"""The page of a sweep in Chromium: nothing is fetched, and a person can read it everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser.devtools import Page
from tests.browser.test_page import (
    LOWEST_CONTRAST,
    NARROW,
    complaints,
    keep_picture,
    opened,
    pytestmark,
    requests,
    tab,
)
from tests.unit.sweeps.test_page import page_of

__all__ = ["pytestmark", "tab"]


@pytest.fixture
def page(tab: Page, tmp_path: Path) -> Page:
    path = tmp_path / "index.html"
    page_of(path)
    return opened(tab, path)


def test_nothing_is_fetched_and_nothing_complains(page: Page) -> None:
    assert [url[:80] for url in requests(page)[1:] if not url.startswith("data:")] == []
    assert complaints(page) == []
    keep_picture(page, "sweep.png")


def test_it_is_readable_on_a_narrow_screen(page: Page) -> None:
    page.resize(NARROW)
    assert page.evaluate("wideElements()") == []
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW
    assert all(page.evaluate("scrollers()"))
    assert page.evaluate("smallestTableText()") >= 12
    # In pixels of the screen: the drawing is scaled, and one title is turned.
    size = "t => 12 * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b)"
    texts = "[...document.querySelectorAll('svg text')]"
    assert page.evaluate(f"Math.min(...{texts}.map({size}))") >= 9
    keep_picture(page, "sweep-narrow.png")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_marks_stand_out_from_what_is_behind_them(page: Page, scheme: str) -> None:
    page.prefer(color_scheme=scheme)
    assert page.evaluate("lowestContrast()")["ratio"] >= LOWEST_CONTRAST
    # SVG is filled and not coloured, which the check above does not read.
    colours = "[...document.querySelectorAll('svg text')].map(t => getComputedStyle(t).fill)"
    found = page.evaluate(f"[...new Set({colours})]")
    assert len(found) == 2
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert all(contrast(colour, ground) >= LOWEST_CONTRAST for colour in found)
    keep_picture(page, f"sweep-{scheme}.png")


def contrast(one: str, other: str) -> float:
    """Of two colours as browsers compute them, https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio."""
    lights = sorted(luminance(colour) for colour in (one, other))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in colour[4:-1].split(",")]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
