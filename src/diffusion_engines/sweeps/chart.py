"""Where the marks, ticks and names of a chart of points go: the page's template draws it as SVG.

An SVG takes the colours of the page, light or dark, and its text can be read out and searched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffusion_engines.report.text import number

WIDTH, HEIGHT = 640.0, 380.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 74.0, 20.0, 18.0, 46.0
_LETTER, _LINE = 6.6, 13.0
_SMALLEST = 1e-9
# From a mark to its name: right, left, above, below, then farther away.
_OFFSETS = ((12, 4), (-12, 4), (0, -13), (0, 21), (12, -10), (12, 18), (-12, -10), (-12, 18))


@dataclass(frozen=True)
class Dot:
    """A point to draw.

    Attributes:
        name: written beside it.
        x, y: its numbers; y is positive or zero.
        kind: a class of the style: ``front``, ``inside``, ``outside``.
        is_picked: whether a ring marks it.
        title: all about it, shown where it is pointed at.
    """

    name: str
    x: float
    y: float
    kind: str
    is_picked: bool
    title: str


@dataclass(frozen=True)
class Placed:
    """A dot in the chart's units, its name's place, and to which side that is written."""

    dot: Dot
    x: float
    y: float
    label_x: float
    label_y: float
    anchor: str


@dataclass(frozen=True)
class Tick:
    """A place on an axis, and what stands there."""

    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """Everything in its place.

    Attributes:
        dots: placed.
        line: the corners of the front, as SVG's points.
        x_ticks, y_ticks: of the axes.
        x_title, y_title: of the axes.
    """

    dots: tuple[Placed, ...]
    line: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_title: str
    y_title: str
    width: float = WIDTH
    height: float = HEIGHT
    left: float = _LEFT
    right: float = WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = HEIGHT - _BOTTOM


def chart_of(dots: Sequence[Dot], x_title: str, y_title: str) -> Chart:
    """Return a chart with a linear x axis and a logarithmic y axis; without dots it is empty."""
    dots = [dot for dot in dots if math.isfinite(dot.x) and math.isfinite(dot.y)]
    x_of, x_ticks = _linear([dot.x for dot in dots])
    y_of, y_ticks = _logarithmic([max(dot.y, _SMALLEST) for dot in dots])
    places = [(dot, x_of(dot.x), y_of(max(dot.y, _SMALLEST))) for dot in dots]
    front = sorted((x, y) for dot, x, y in places if dot.kind == "front")
    return Chart(
        dots=tuple(_labelled(places)),
        line=" ".join(f"{x:.1f},{y:.1f}" for x, y in _stairs(front)),
        x_ticks=tuple(x_ticks),
        y_ticks=tuple(y_ticks),
        x_title=x_title,
        y_title=y_title,
    )


def _stairs(front: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the corners of what the front's points beat: right to the next x, then down to it."""
    corners: list[tuple[float, float]] = []
    for x, y in front:
        if corners:
            corners.append((x, corners[-1][1]))
        corners.append((x, y))
    return corners


def _linear(values: Sequence[float]) -> tuple[Callable[[float], float], list[Tick]]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    margin = (high - low) * 0.12 or abs(high) * 0.2 or 1.0
    low, high = max(0.0, low - margin) if low >= 0 else low - margin, high + margin
    step = _round_step((high - low) / 5)
    left, right = _LEFT, WIDTH - _RIGHT

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    first = math.ceil(low / step)
    count = math.floor(high / step) - first + 1
    ticks = [(first + index) * step for index in range(count)]
    return place, [Tick(place(tick), number(tick) if tick else "0") for tick in ticks]


def _round_step(raw: float) -> float:
    size = 10.0 ** math.floor(math.log10(raw))
    return next(factor * size for factor in (1, 2, 5, 10) if factor * size >= raw)


def _logarithmic(values: Sequence[float]) -> tuple[Callable[[float], float], list[Tick]]:
    logs = [math.log10(value) for value in values] or [-3.0]
    low, high = math.floor(min(logs) - 0.15), math.ceil(max(logs) + 0.15)
    top, bottom = _TOP, HEIGHT - _BOTTOM

    def place(value: float) -> float:
        return bottom - (math.log10(value) - low) / (high - low) * (bottom - top)

    every = max(1, math.ceil((high - low) / 8))
    return place, [
        Tick(place(10.0**power), f"{10.0**power:.0e}") for power in range(low, high + 1, every)
    ]


Place = tuple[Dot, float, float]


def _labelled(places: Sequence[Place]) -> list[Placed]:
    """Give every name the first place beside its mark that covers neither marks nor names."""
    taken = [(x - 8, y - 8, x + 8, y + 8) for _, x, y in places]
    found = []
    for dot, x, y in places:
        options = [_label(dot.name, x, y, *offset) for offset in _OFFSETS]
        # Farther up and down, where many points lie close together.
        options += [
            _label(dot.name, x, y, side, 4 + sign * _LINE * row)
            for row in range(2, 8)
            for sign in (-1, 1)
            for side in (12, -12)
        ]
        free = [one for one in options if _is_inside(one[3]) and not _covers(one[3], taken)]
        label_x, label_y, anchor, box = (free or options)[0]
        taken.append(box)
        found.append(Placed(dot, x, y, label_x, label_y, anchor))
    return found


Box = tuple[float, float, float, float]


def _label(name: str, x: float, y: float, dx: float, dy: float) -> tuple[float, float, str, Box]:
    width = len(name) * _LETTER
    anchor = "middle" if dx == 0 else "start" if dx > 0 else "end"
    left = {"start": x + dx, "end": x + dx - width, "middle": x - width / 2}[anchor]
    return x + dx, y + dy, anchor, (left, y + dy - _LINE + 3, left + width, y + dy + 3)


def _is_inside(box: Box) -> bool:
    return box[0] >= _LEFT and box[2] <= WIDTH - 2 and box[1] >= 2 and box[3] <= HEIGHT - _BOTTOM


def _covers(box: Box, taken: Sequence[Box]) -> bool:
    return any(
        box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
        for other in taken
    )
