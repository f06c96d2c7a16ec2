"""What a check is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["passed", "failed", "missing"]


@dataclass(frozen=True)
class Finding:
    """What a check came to.

    Attributes:
        status: ``missing``: the machine lacks what is checked, so that nothing can be said.
        detail: for a person; of a failure the whole message.
        facts: numbers and names, for whoever reads the JSON.
        seconds: that it took, set by the runner.
    """

    status: Status
    detail: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def passed(detail: str, **facts: Any) -> Finding:
    """Return the finding of a check that came out well."""
    return Finding("passed", detail, facts)


def missing(detail: str, **facts: Any) -> Finding:
    """Return the finding of a check that this machine has not what it takes for."""
    return Finding("missing", detail, facts)


@dataclass(frozen=True)
class Check:
    """One thing to find out.

    Attributes:
        name: unique, and a file's.
        title: for the page.
        run: does it in a folder that all checks share; it returns what it found, and whatever it
            raises is a failure.
        needs: the checks that have to have passed, because this one builds on them.
    """

    name: str
    title: str
    run: Callable[[Path], Finding]
    needs: Sequence[str] = ()
