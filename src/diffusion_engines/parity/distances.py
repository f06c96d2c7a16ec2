"""The distance of an output from its reference, as numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """Distance of one output from its reference.

    Attributes:
        rel_l2: L2 norm of the difference over that of the reference.
        max_abs: largest absolute difference, in the output's own unit.
        cosine: cosine of the angle between both as vectors.
        not_finite: how many values of the output are NaN or infinite.
    """

    rel_l2: float
    max_abs: float
    cosine: float
    not_finite: int


def worst_of(found: Sequence[Difference]) -> Difference:
    """Return the worst of each distance; where one is NaN, so is the worst."""
    return Difference(
        rel_l2=largest(value.rel_l2 for value in found),
        max_abs=largest(value.max_abs for value in found),
        cosine=smallest(value.cosine for value in found),
        not_finite=sum(value.not_finite for value in found),
    )


def largest(values: Iterable[float]) -> float:
    """Return the largest value, NaN where there is one: ``max`` drops it or not, by their order."""
    kept = list(values)
    return math.nan if any(map(math.isnan, kept)) else max(kept)


def smallest(values: Iterable[float]) -> float:
    """Return the smallest value, NaN where there is one."""
    return -largest(-value for value in values)
