"""The page of a sweep: every point is named, the recommended one marked, and no name hidden."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

from diffusion_engines.sweeps.chart import Dot, Placed, chart_of
from diffusion_engines.sweeps.fronts import Points, read_rules
from diffusion_engines.sweeps.measured import PointResult, SweepRecord
from diffusion_engines.sweeps.page import write_page
from tests.composition import ROOT
from tests.unit.sweeps.test_fronts import ALL, BROKEN

FAILED = PointResult(
    "s-bf16", ("x=1",), "k", "failed", 3.0, "build@cpu-unet: <b>refused</b>", (), None
)


def page_of(path: Path) -> str:
    """A page with points of every state, and one that has not been run."""
    results = [replace(one, name=f"s-{one.name}") for one, _ in ALL]
    points = tuple(zip(results, (numbers for _, numbers in ALL), strict=True))
    names = [*(one.name for one in results), FAILED.name, "s-late"]
    record = SweepRecord(
        "s",
        "cpu",
        tuple((name, (f"a.b={name}",), "k") for name in names),
        "diffusion-engines sweep s",
    )
    write_page(path, record, Points(points, read_rules(ROOT)), [*results, FAILED])
    return path.read_text()


def test_every_point_is_named_with_what_it_is(tmp_path: Path) -> None:
    page = page_of(tmp_path / "index.html")
    for result, _ in ALL:
        assert len(re.findall(rf">{result.name}</text>", page)) == 2  # in both charts
    assert page.count('class="picked"') == 3  # and in the key
    assert page.count('class="chosen"') == 2
    assert re.search(r"recommended, by the rule fastest</dt><dd>int8", page)
    assert "pick=fastest --sweep s" in page
    assert page.count('circle class="outside"') == 3
    assert "&lt;b&gt;refused" in page
    assert "<b>refused" not in page
    assert "Without a result yet: s-late" in page
    assert "http" not in page.replace("http-equiv", "")


def test_where_no_point_is_within_the_gates_none_is_recommended(tmp_path: Path) -> None:
    record = SweepRecord("s", "cpu", (("broken", (), "k"),), "diffusion-engines sweep s")
    path = tmp_path / "index.html"
    write_page(path, record, Points((BROKEN,), read_rules(ROOT)), [BROKEN[0]])
    assert "none can be recommended" in path.read_text()
    write_page(path, record, Points((), read_rules(ROOT)), [])
    assert "<svg" not in path.read_text()


def box(placed: Placed) -> tuple[float, float, float, float]:
    width = 6.6 * len(placed.dot.name)
    left = {"start": 0.0, "middle": width / 2, "end": width}[placed.anchor]
    x = placed.label_x - left
    return x, placed.label_y - 10, x + width, placed.label_y + 3


def test_no_name_covers_another_or_leaves_the_chart() -> None:
    dots = [
        Dot(f"a-long-name-{index}", 10 + 0.01 * index, 1e-3, "front", index == 0, "")
        for index in range(8)
    ]
    chart = chart_of([*dots, Dot("far", 99.0, 1.0, "inside", False, "")], "ms", "error")
    boxes = [box(placed) for placed in chart.dots]
    for one, other in itertools.combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    assert all(left >= chart.left and right <= chart.width for left, _, right, _ in boxes)


def test_the_axes_hold_every_number() -> None:
    values = [(0.0, 0.0), (0.5, 1e-12), (3000.0, 0.9), (float("nan"), 1.0), (1.0, float("inf"))]
    dots = [Dot(str(index), x, y, "front", False, "") for index, (x, y) in enumerate(values)]
    chart = chart_of(dots, "ms", "error")
    assert [placed.dot.name for placed in chart.dots] == ["0", "1", "2"]
    for placed in chart.dots:
        assert chart.left <= placed.x <= chart.right
        assert chart.top <= placed.y <= chart.bottom
    assert len(chart.x_ticks) >= 3
    assert len(chart.y_ticks) >= 3
    alone = chart_of([Dot("one", 5.0, 1e-3, "front", True, "")], "ms", "error")
    assert chart.left < alone.dots[0].x < chart.right
