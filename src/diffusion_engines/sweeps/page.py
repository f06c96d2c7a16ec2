"""The page of a sweep: its fronts, its table, and the points that the rules pick."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusion_engines.files import new_file
from diffusion_engines.report import text
from diffusion_engines.report.page import page_environment
from diffusion_engines.sweeps.chart import Chart, Dot, chart_of
from diffusion_engines.sweeps.fronts import Measured, Points, Rule
from diffusion_engines.sweeps.measured import PointResult, SweepRecord

_ERROR = "relative L2 error, at the worst call of any component"
_AXES = {"latency": "milliseconds a picture, median", "size": "MB of engines"}
# The rule whose point is marked: quality is what the gates are for.
RECOMMENDING = "fastest"


def write_page(
    path: Path, record: SweepRecord, points: Points, results: Sequence[PointResult]
) -> None:
    """Write the page of a sweep, which needs no server and no network.

    Args:
        path: of the page.
        record: the sweep.
        points: those that were measured.
        results: of all points that have ended.
    """
    environment = page_environment("sweeps")
    environment.globals["text"] = text
    page = environment.get_template("page.html.j2").render(
        record=record,
        points=points,
        results=results,
        waiting=[name for name, _, _ in record.points if name not in {r.name for r in results}],
        recommended=points.picks.get(RECOMMENDING),
        recommending=RECOMMENDING,
        rules={name: describe(rule) for name, rule in points.rules.items()},
        charts={of: _chart(points, of, record.name) for of in _AXES} if points.measured else {},
        short=lambda name: short_name(name, record.name),
        machines=list(dict.fromkeys(text.machine(n.machine) for _, n in points.measured)),
    )
    with new_file(path) as partial:
        partial.write_text(page, encoding="utf-8")


def describe(rule: Rule) -> str:
    """Say what a rule picks, in words."""
    if rule.rule == "knee":
        return (
            f"where less {rule.of} begins to cost much more error: the point of the front of "
            f"{rule.of} that is farthest below the line between its ends, within the gates"
        )
    if rule.of == "latency":
        return (
            "the fastest within the gates; of those that its repeats cannot tell from it, the one "
            "with the smallest error"
        )
    what = "the smallest engines" if rule.of == "size" else f"the smallest {rule.of}"
    return f"{what} within the gates"


def short_name(name: str, sweep: str) -> str:
    """Return what tells a point from the others of its sweep."""
    return name.removeprefix(f"{sweep}-") or name


def _chart(points: Points, of: str, sweep: str) -> Chart:
    dots = [_dot(one, points, of, sweep) for one in points.measured]
    # The front lies over what it beats.
    return chart_of(sorted(dots, key=lambda dot: dot.kind == "front"), _AXES[of], _ERROR)


def _dot(one: Measured, points: Points, of: str, sweep: str) -> Dot:
    result, numbers = one
    kind = "outside" if result.state == "outside" else "inside"
    return Dot(
        name=short_name(result.name, sweep),
        x=numbers.latency_ms if of == "latency" else numbers.size_mb,
        y=numbers.error,
        kind="front" if result.name in points.fronts[of] else kind,
        is_picked=result.name == points.picks.get(RECOMMENDING),
        title=f"{result.name}: {text.number(numbers.latency_ms)} ms, error "
        f"{text.scientific(numbers.error)} ({numbers.component}), {numbers.size_mb:.1f} MB",
    )
