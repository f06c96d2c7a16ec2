"""The figures: where the time goes, and how the error develops along the trajectory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator
from PIL import Image

from diffusion_engines.bench.results import Benchmark
from diffusion_engines.families import role_of
from diffusion_engines.parity.distances import Difference
from diffusion_engines.parity.results import LatentsParity, Quantization, Validation
from diffusion_engines.report.text import number, words

# The parts of the total, in the order in which they run; colours that print and colour-blind
# readers can tell apart (Okabe and Ito).
_PARTS = {
    "encoding": "#56B4E9",
    "denoiser": "#0072B2",
    "scheduler_and_guidance": "#E69F00",
    "decoding": "#009E73",
}
_ROLES = {"encoder": "#56B4E9", "denoiser": "#0072B2", "decoder": "#009E73"}
_PRECISIONS = {
    "fp32": "#555555",
    "fp16-mixed": "#56B4E9",
    "fp16": "#0072B2",
    "fp8": "#E69F00",
    "int8": "#D55E00",
}
_TOLERANCE = "#D55E00"
# What an axis shows where every error and tolerance is zero.
_SMALLEST = 1e-7
# Of the files, for sharp screens, and of the page, where letters of 10 points are as large as text.
_DPI, _PAGE_DPI = 160, 112
_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "savefig.facecolor": "white",
}


def drawn_width(path: Path) -> int:
    """Return how wide a figure is on the page, in CSS pixels, so that all have equal letters."""
    with Image.open(path) as image:
        return round(image.width * _PAGE_DPI / _DPI)


def draw_breakdown(path: Path, benchmark: Benchmark) -> None:
    """Draw the article's bar chart: median milliseconds of each phase, a bar per runner."""
    with plt.rc_context(_STYLE):
        runners = benchmark.runners
        size = (8, 1.4 + 0.6 * len(runners))
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        totals = {runner: benchmark.median(runner, "total") for runner in runners}
        for row, runner in enumerate(runners):
            left = 0.0
            for part, colour in _PARTS.items():
                value = benchmark.median(runner, part)
                axes.barh(row, value, left=left, color=colour, label=words(part), height=0.58)
                if value > 0.07 * max(totals.values()):
                    axes.text(
                        left + value / 2,
                        row,
                        number(value),
                        color="white",
                        ha="center",
                        va="center",
                    )
                left += value
            axes.text(left, row, f"  {number(totals[runner])} ms", va="center", weight="bold")
        labels = [
            label.replace(", ", ",\n", 1) for label in map(benchmark.labels.__getitem__, runners)
        ]
        axes.set_yticks(range(len(runners)), labels)
        axes.invert_yaxis()
        axes.set_xlim(0, max(totals.values()) * 1.16)
        axes.set_xlabel("milliseconds per run, median")
        handles, parts = axes.get_legend_handles_labels()
        unique = dict(zip(parts, handles, strict=True))
        figure.legend(
            unique.values(), unique.keys(), loc="outside upper center", ncols=4, frameon=False
        )
        _save(figure, path)


def draw_parity(path: Path, validation: Validation, batches: int) -> None:
    """Draw the relative L2 error of every call, with the tolerance of each component as a line.

    The calls of all trajectories share an axis: the denoiser's step within its trajectory.
    """
    with plt.rc_context(_STYLE):
        parts = [part for part in validation.components if part.calls]
        figure, grid = _panels(len(parts))
        errors = {part.component: _errors(part.calls) for part in parts}
        tolerances = [part.gate.rel_l2 for part in parts]
        limits = _limits([*tolerances, *(v for line in errors.values() for v in line)])
        for axes, part in zip(grid, parts, strict=True):
            runs = batches if len(part.calls) % max(batches, 1) == 0 else 1
            steps = len(part.calls) // runs
            calls = errors[part.component]
            lines = [calls[run * steps : (run + 1) * steps] for run in range(runs)]
            role = role_of(part.component)
            colour = _ROLES.get(role or "", "#555555")
            _draw_errors(axes, lines, part.gate.rel_l2, limits, colour)
            axes.set_title(f"{words(part.component)}, {part.precision}", fontsize=10)
            axes.set_xlabel("step" if role == "denoiser" else "call")
        figure.supylabel("relative L2 error", fontsize=10)
        _save(figure, path)


def draw_latents(path: Path, latents: LatentsParity) -> None:
    """Draw how far the latents of whole runs are after every step, a line per image."""
    with plt.rc_context(_STYLE):
        figure, grid = _panels(2)
        errors = [_errors(image) for image in latents.images]
        distances = [[1 - found.cosine for found in image] for image in latents.images]
        panels = (
            ("relative L2 error", errors, latents.gate.rel_l2),
            ("1 − cosine", distances, 1 - latents.gate.cosine),
        )
        for axes, (title, lines, tolerance) in zip(grid, panels, strict=True):
            limits = _limits([tolerance, *(value for line in lines for value in line)])
            _draw_errors(axes, lines, tolerance, limits, _ROLES["denoiser"])
            axes.set_title(f"latents, {title}", fontsize=10)
            axes.set_xlabel("after step")
        _save(figure, path)


def draw_quantization(path: Path, quantizations: Sequence[Quantization], batches: int) -> None:
    """Draw the relative L2 error of every call, a panel per component and a line per precision.

    Lines of several trajectories share the axis, as in :func:`draw_parity`.
    """
    with plt.rc_context(_STYLE):
        components = list(dict.fromkeys(_split(found.name)[0] for found in quantizations))
        figure, grid = plt.subplots(
            1,
            len(components),
            figsize=(max(4.2, 3.1 * len(components)), 3.0),
            layout="constrained",
            sharey=True,
            squeeze=False,
        )
        for axes, component in zip(grid[0], components, strict=True):
            lines: dict[str, list[float]] = {}
            for found in quantizations:
                if _split(found.name)[0] == component:
                    lines[_split(found.source)[1]] = _errors(found.parity.source)
                    lines[_split(found.name)[1]] = _errors(found.parity.graph)
            steps = 1
            for precision, calls in lines.items():
                runs = batches if len(calls) % max(batches, 1) == 0 else 1
                steps = len(calls) // runs
                for run in range(runs):
                    # Zero and infinity have no place on a logarithmic axis: the line breaks there.
                    values = [v if 0 < v < math.inf else math.nan for v in calls]
                    axes.plot(
                        range(1, steps + 1),
                        values[run * steps : (run + 1) * steps],
                        color=_PRECISIONS[precision],
                        label=precision,
                        marker="o",
                        ms=3,
                        lw=1,
                    )
            axes.set_yscale("log")
            axes.set_title(words(component), fontsize=10)
            axes.set_xlabel("step" if role_of(component) == "denoiser" else "call")
            axes.set_xlim(0.5, steps + 0.5)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        unique: dict[str, Any] = {}
        for axes in grid[0]:
            handles, labels = axes.get_legend_handles_labels()
            unique |= dict(zip(labels, handles, strict=True))
        figure.legend(
            unique.values(), unique.keys(), loc="outside upper center", ncols=6, frameon=False
        )
        figure.supylabel("relative L2 error", fontsize=10)
        _save(figure, path)


def _errors(calls: Sequence[Difference]) -> list[float]:
    return [found.rel_l2 for found in calls]


def _split(graph: str) -> tuple[str, str]:
    """Component and precision of a graph: ``unet-fp16-mixed`` is of the UNet."""
    component, _, precision = graph.partition("-")
    return component, precision


def _panels(count: int) -> tuple[Any, Any]:
    figure, grid = plt.subplots(
        1, count, figsize=(max(4.2, 3.1 * count), 2.8), layout="constrained", squeeze=False
    )
    return figure, grid[0]


def _draw_errors(
    axes: Any,
    lines: Sequence[Sequence[float]],
    tolerance: float,
    limits: tuple[float, float],
    colour: str,
) -> None:
    """Draw a line per run on a logarithmic axis, and the tolerance across."""
    low, high = limits
    for values in lines:
        # A perfect match lies on the lower edge; a broken call is a cross on the upper.
        drawn = [max(v, low) if math.isfinite(v) else math.nan for v in values]
        axes.plot(range(1, len(values) + 1), drawn, color=colour, marker="o", ms=3, lw=1)
        broken = [call for call, v in enumerate(values, 1) if not math.isfinite(v)]
        if broken:
            style: Any = {"color": _TOLERANCE, "marker": "x", "ls": "", "clip_on": False}
            # Outside the axes, where the layout must not make room for it.
            axes.plot(broken, [high] * len(broken), in_layout=False, **style)
    drawn_tolerance = max(tolerance, low)  # that of a cosine of 1 is zero
    axes.axhline(drawn_tolerance, color=_TOLERANCE, ls="--", lw=1.2)
    axes.text(
        0.02,
        drawn_tolerance,
        "tolerance",
        color=_TOLERANCE,
        fontsize=8,
        va="bottom",
        transform=axes.get_yaxis_transform(),
    )
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_xlim(0.5, max(map(len, lines)) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """One range around every finite error and every tolerance; zeros lie on its lower edge."""
    positive = [value for value in values if 0 < value < math.inf] or [_SMALLEST]
    return 10.0 ** math.floor(math.log10(min(positive)) - 0.15), max(positive) * 10**0.4


def _save(figure: Any, path: Path) -> None:
    # Without the library's version and the date, so that equal content has an equal hash.
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    plt.close(figure)
