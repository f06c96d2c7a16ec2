"""Find the groups of layers that can have 8 bits: measured alone, ordered, accumulated.

Errors of layers that are lowered together add up about as independent noise does, so what a set
costs is predicted from what each group costs alone. The prediction orders; measurements decide.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from diffusion_engines.errors import OutOfTimeError
from diffusion_engines.parity.distances import Difference, worst_of


@dataclass(frozen=True)
class Measured:
    """A graph of which some groups are lowered.

    Attributes:
        calls: its distance from the reference at each recorded call.
        bytes: of the graph and its weights.
    """

    calls: tuple[Difference, ...]
    bytes: int

    @property
    def rel_l2(self) -> float:
        """Relative L2 error at the worst call."""
        return worst_of(self.calls).rel_l2


@dataclass(frozen=True)
class Point:
    """A set of lowered groups, and what it costs.

    Attributes:
        lowered: the groups.
        predicted: relative L2 error at the worst call, from what each group costs alone.
        measured: None: there was no time for it.
        passes: whether it is within the gates; None: not measured.
    """

    lowered: tuple[str, ...]
    predicted: float
    measured: Measured | None
    passes: bool | None


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        alone: what each group costs alone, the cheapest for its bytes first.
        curve: groups added in that order, from none to all.
        chosen: as many groups as the gates allow; its measurement is of the graph as it is built.
    """

    alone: Mapping[str, Measured]
    curve: tuple[Point, ...]
    chosen: Point


Lowered = frozenset[str]


def search(
    names: Sequence[str],
    measure: Callable[[Lowered], Measured],
    build: Callable[[Lowered], Measured],
    passes: Callable[[Measured], bool],
) -> Found | None:
    """Return as many groups as pass; None where nothing can be lowered.

    The longest prefix that passes is found by bisection, in the order of what a group costs for the
    bytes that it saves. Each later group is then tried on top of it. What is
    chosen is built; where that does not pass, the last group is given up, and so on. What time is
    left goes into the rest of the curve.

    Args:
        names: of the groups.
        measure: a graph with these groups lowered, nearly as it is built and sooner.
        build: the same, as it is built.
        passes: whether a graph is within the gates.

    Raises:
        OutOfTimeError: of ``measure`` or ``build``, before the choice was made.
    """
    none = measure(frozenset())
    if not passes(none):
        return None
    alone = {name: measure(frozenset({name})) for name in names}
    order = sorted(names, key=lambda name: (_price(alone[name], none), name))

    def point(lowered: Sequence[str], measured: Measured | None) -> Point:
        predicted = predicted_rel_l2(none, [alone[name] for name in lowered])
        ok = None if measured is None else passes(measured)
        return Point(tuple(lowered), predicted, measured, ok)

    taken = order[: _longest(order, measure, passes)]
    for name in order[len(taken) + 1 :]:  # the next one in the order was refused just now
        if passes(measure(frozenset({*taken, name}))):
            taken = [*taken, name]
    while taken and not passes(built := build(frozenset(taken))):
        taken = taken[:-1]
    if not taken:
        return None
    chosen = point(taken, built)

    curve = []
    for count in range(len(order) + 1):
        found = None
        with contextlib.suppress(OutOfTimeError):
            found = measure(frozenset(order[:count]))
        curve.append(point(order[:count], found))
    return Found({name: alone[name] for name in order}, tuple(curve), chosen)


def _longest(
    order: Sequence[str],
    measure: Callable[[Lowered], Measured],
    passes: Callable[[Measured], bool],
) -> int:
    if passes(measure(frozenset(order))):
        return len(order)
    good, bad = 0, len(order)
    while bad - good > 1:
        middle = (good + bad) // 2
        if passes(measure(frozenset(order[:middle]))):
            good = middle
        else:
            bad = middle
    return good


def _price(group: Measured, none: Measured) -> float:
    """Return what a group adds to the squared error at the worst call, for each byte it saves."""
    return _added(group.rel_l2, none.rel_l2) / max(none.bytes - group.bytes, 1)


def predicted_rel_l2(none: Measured, groups: Sequence[Measured]) -> float:
    """Return the relative L2 error at the worst call where errors add up as independent noise.

    Args:
        none: the graph with nothing lowered.
        groups: with one group lowered each.
    """
    return max(
        math.sqrt(
            base.rel_l2**2 + sum(_added(group.calls[call].rel_l2, base.rel_l2) for group in groups)
        )
        for call, base in enumerate(none.calls)
    )


def _added(error: float, base: float) -> float:
    return max(error**2 - base**2, 0.0)
