"""Which points of a sweep nothing beats, and which one a rule picks.

A point is on the front of two numbers where no other point is at least as good in both and better
in one (Pareto). Points out of a gate are shown, and are on no front.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic.dataclasses import dataclass as checked

from diffusion_engines.backends.base import STRICT
from diffusion_engines.bench.noise import direction_of
from diffusion_engines.sweeps.measured import Numbers, PointResult
from diffusion_engines.sweeps.points import read_option

FOLDER = Path("conf/pick")
Quantity = Literal["latency", "size", "error"]
_VALUES: Mapping[str, Callable[[Numbers], float]] = {
    "latency": lambda numbers: numbers.latency_ms,
    "size": lambda numbers: numbers.size_mb,
    "error": lambda numbers: numbers.error,
}
# An error of zero has no logarithm; of fp32, this is nothing.
_SMALLEST_ERROR = 1e-9


@checked(config=STRICT)
class Rule:
    """How one point is picked of those within the gates (conf/pick/)."""

    rule: Literal["smallest", "knee"]
    of: Quantity


Measured = tuple[PointResult, Numbers]


@dataclass(frozen=True)
class Points:
    """The measured points of a sweep, and what each rule picks.

    Attributes:
        measured: with their numbers, in the order of the sweep.
        rules: by name.
    """

    measured: tuple[Measured, ...]
    rules: Mapping[str, Rule]

    @cached_property
    def fronts(self) -> Mapping[str, frozenset[str]]:
        """The names on the fronts of ``latency`` and of ``size``, against the error."""
        return {of: front(self.within, of) for of in ("latency", "size")}

    @property
    def within(self) -> tuple[Measured, ...]:
        """Those that pass every gate."""
        return tuple(one for one in self.measured if one[0].state == "done")

    @cached_property
    def picks(self) -> Mapping[str, str]:
        """The name that each rule picks, by the rule's; empty where no point passes the gates."""
        if not self.within:
            return {}
        return {name: pick(self.within, rule) for name, rule in self.rules.items()}

    def notes(self, name: str) -> list[str]:
        """Say what a point is: on which fronts, and picked by which rules."""
        fronts = [f"front of {of}" for of, names in self.fronts.items() if name in names]
        return [*[rule for rule, picked in self.picks.items() if picked == name], *fronts]


def read_rules(root: Path) -> dict[str, Rule]:
    """Return every rule of ``conf/pick/`` by its name.

    Raises:
        ConfigError: a file is no rule.
    """
    names = sorted(path.stem for path in (root / FOLDER).glob("*.yaml"))
    return {name: read_option(root, FOLDER, name, Rule) for name in names}


def front(points: Sequence[Measured], of: str) -> frozenset[str]:
    """Return the names of those that no other one beats in a quantity and the error."""
    value, error = _VALUES[of], _VALUES["error"]
    places = {result.name: (value(numbers), error(numbers)) for result, numbers in points}
    return frozenset(
        name
        for name, place in places.items()
        if all(map(math.isfinite, place))
        and not any(
            other[0] <= place[0] and other[1] <= place[1] and other != place
            for other in places.values()
        )
    )


def pick(points: Sequence[Measured], rule: Rule) -> str:
    """Return the name of the point that a rule picks of those within the gates; at least one."""
    if rule.rule == "knee":
        return _knee(points, rule.of)
    value = _VALUES[rule.of]
    best = min(points, key=lambda one: (value(one[1]), one[1].error))
    equal = [one for one in points if value(one[1]) == value(best[1])]
    if rule.of == "latency":
        # The fastest by its median may be so by chance: its repeats decide (comparison/changes.py).
        equal += [one for one in points if _as_fast(best[1], one[1])]
    return min(equal, key=lambda one: (one[1].error, value(one[1])))[0].name


def _as_fast(one: Numbers, other: Numbers) -> bool:
    return direction_of(one.repeats_ms, other.repeats_ms) == 0


def _knee(points: Sequence[Measured], of: str) -> str:
    """Return the point of the front that is farthest below the line between the front's ends.

    Both axes span the front, that of the error by its logarithm (the knee of Das, 1999,
    https://doi.org/10.1007/BF01195985). A front without a point below the line has none: its
    end of the smaller quantity.
    """
    names, value = front(points, of), _VALUES[of]
    places = {
        result.name: (value(numbers), math.log10(max(numbers.error, _SMALLEST_ERROR)))
        for result, numbers in points
        if result.name in names
    }
    lows, spans = [], []
    for axis in (0, 1):
        along = [place[axis] for place in places.values()]
        lows.append(min(along))
        spans.append(max(along) - min(along) or 1.0)

    def below(name: str) -> float:
        x, y = ((places[name][axis] - lows[axis]) / spans[axis] for axis in (0, 1))
        return 1 - x - y

    return max(sorted(places, key=lambda name: places[name]), key=lambda n: round(below(n), 9))
