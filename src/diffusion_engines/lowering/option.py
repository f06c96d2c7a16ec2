"""Write what a search found into ``conf/``, with its curve, and into tables and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusion_engines.errors import ConfigError
from diffusion_engines.files import new_file, new_folder, write_table
from diffusion_engines.lowering.figure import draw_search
from diffusion_engines.lowering.search import Found, Measured

_MARK = "found by `diffusion-engines quantize-auto"


@dataclass(frozen=True)
class Choice:
    """The layers of a graph that get 8 bits.

    Attributes:
        component, precision: of the graph.
        allowed: relative L2 error at any call that the search stayed below.
        found: by the search.
        built: what the graph measures that the stage `quantize` makes of it.
        lowered: the groups that it lowers.
        kept: the patterns that say so in ``quantize.<precision>.kept.<component>``.
    """

    component: str
    precision: str
    allowed: float
    found: Found
    built: Measured
    lowered: Sequence[str]
    kept: Sequence[str]


def check_option(path: Path) -> None:
    """Return if a search may write this option.

    Raises:
        ConfigError: somebody else wrote it.
    """
    if path.is_file() and _MARK not in path.read_text().partition("\n")[0]:
        raise ConfigError(
            f"{path} is not one that a search wrote",
            expected="a new option, or one of an earlier search",
            found=f"{path.name}, written by somebody",
            fix="give the option another name with --option",
        )


def write_option(path: Path, choice: Choice, base: str) -> None:
    """Write an option of ``conf/quantize/``; equal findings write equal bytes.

    Args:
        path: of the file.
        choice: that it makes.
        base: the option that says all else.
    """
    graph = f"{choice.component}-{choice.precision}"
    kept = [f"      - '{pattern.replace(chr(39), chr(39) * 2)}'" for pattern in choice.kept]
    found, count = choice.found, len(choice.found.alone)
    lines = [
        f"# The layers of {graph} in 8 bits, {_MARK} {graph}`.",
        f'# `make repro ARGS="fleet=precisions quantize={path.stem}"`',
        "#",
        f"# {len(choice.lowered)} of {count} groups of layers; relative L2 error at the worst of"
        f" {len(choice.built.calls)} recorded calls",
        f"# {choice.built.rel_l2:.2e}, allowed {choice.allowed:.2e},"
        f" predicted {found.chosen.predicted:.2e}; {choice.built.bytes / 1e6:.1f} MB.",
        "# The curve, a group more in each line, the cheapest for its bytes first:",
        "#",
        *(f"# {line}" for line in curve_table(found)),
        "defaults:",
        f"  - {base}",
        "  - _self_",
        f"{choice.precision}:",
        "  kept:",
        f"    {choice.component}:" if kept else f"    {choice.component}: []",
        *kept,
    ]
    with new_file(path) as partial:
        partial.write_text("\n".join(lines) + "\n")


def curve_table(found: Found) -> list[str]:
    """Return the curve as lines of text; ``-`` is what was not measured."""
    rows = ["groups     MB  measured  predicted  with"]
    for point in found.curve:
        there = point.measured
        size = f"{there.bytes / 1e6:.1f}" if there else "-"
        error = f"{there.rel_l2:.2e}" if there else "-"
        last = point.lowered[-1] if point.lowered else "none"
        rows.append(
            f"{len(point.lowered):>6} {size:>6}  {error:>8}  {point.predicted:>9.2e}  {last}"
        )
    return rows


def write_tables(folder: Path, choice: Choice) -> None:
    """Write ``curve.csv``, ``groups.csv`` and ``search.png`` for people."""
    found = choice.found
    with new_folder(folder) as made:
        write_table(
            made / "curve.csv",
            [
                {
                    "groups": len(point.lowered),
                    "with": point.lowered[-1] if point.lowered else "",
                    "bytes": point.measured.bytes if point.measured else "",
                    "rel_l2": point.measured.rel_l2 if point.measured else "",
                    "predicted_rel_l2": point.predicted,
                    "passes": "" if point.passes is None else point.passes,
                }
                for point in found.curve
            ],
        )
        write_table(
            made / "groups.csv",
            [
                {"group": name, "call": call, "bytes": one.bytes, "rel_l2": difference.rel_l2}
                for name, one in found.alone.items()
                for call, difference in enumerate(one.calls)
            ],
        )
        draw_search(made / "search.png", found, choice.built, choice.allowed)
