"""Whether two sets of repeats differ by more than their own noise.

Repeats decide, and no threshold: they differ where the Mann-Whitney U test finds them unlike
(https://doi.org/10.1214/aoms/1177730491), at a level of one percent.
"""

from __future__ import annotations

from collections.abc import Sequence

# Of the test: how often equal engines may be told apart.
_LEVEL = 0.01


def direction_of(before: Sequence[float], after: Sequence[float]) -> int | None:
    """Return -1 where a sample is smaller, 1 where it is larger, 0 for noise; None: too few."""
    from scipy.stats import mannwhitneyu

    if not before or not after:
        return None
    # The smallest p that samples of these sizes can have: all of one below all of the other.
    smallest = mannwhitneyu(range(len(before)), range(-len(after), 0), method="exact").pvalue
    if smallest > _LEVEL:
        return None
    found = mannwhitneyu(before, after)
    if found.pvalue > _LEVEL:
        return 0
    return -1 if sorted(after)[len(after) // 2] < sorted(before)[len(before) // 2] else 1
