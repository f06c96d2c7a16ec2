"""How this project says things to a person."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

_SHOWN = 6


def some(names: Sequence[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    shown = ", ".join(names[:_SHOWN])
    more = len(names) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def console(width: int = 124) -> Console:
    """Return where tables are printed; ``width`` is that of a log, which has none of its own."""
    return Console(width=None if sys.stdout.isatty() else width)
