"""The tiers of tests: `make test` has a case of every behaviour, `make test-long` all cases.

But for those that CI, which runs both, has no time for: `make test-full` has them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

long = pytest.mark.long
full = pytest.mark.full


def long_but(quick: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Return the cases of a matrix for `parametrize`, marked as long but for the quick ones."""
    listed = list(cases)
    unknown = [case for case in quick if case not in listed]
    assert not unknown, f"no such cases: {unknown}"
    return [case if case in quick else _marked(case) for case in listed]


def _marked(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=long)
