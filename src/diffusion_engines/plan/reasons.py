"""Why a stage runs: each reason names what changed, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal[
    "param", "file", "fingerprint", "machine", "output", "cache", "command", "new", "stage", "here"
]
_SHOWN = 4
_LONGEST = 60


@dataclass(frozen=True)
class Reason:
    """A change.

    Attributes:
        kind: of it. ``stage``: another stage's output, which may be another one; ``here``: this
            machine cannot do it.
        what: the key, path or stage that changed.
        text: a clause that says how.
    """

    kind: Kind
    what: str
    text: str

    def __str__(self) -> str:
        return self.text


def of_value(kind: Kind, key: str, before: Any, after: Any) -> Reason:
    """A value that was another one."""
    return Reason(kind, key, f"{key}: {_value(before)} → {_value(after)}")


def of_files(path: str, changes: Sequence[str]) -> Reason:
    """A file or folder with other content; ``changes`` name the files where they are known."""
    if not changes:
        return Reason("file", path, f"{path} changed")
    shown = ", ".join(changes[:_SHOWN])
    more = f" and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
    return Reason("file", path, f"{path}: {shown}{more}")


def changes_between(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Return which files of two listings differ: ``a.py changed``, ``b.py is new``."""
    found = []
    for name in sorted({*before, *after} - {""}):
        if name not in after:
            found.append(f"{name} is gone")
        elif name not in before:
            found.append(f"{name} is new")
        elif before[name] != after[name]:
            found.append(f"{name} changed")
    return found


def _value(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
