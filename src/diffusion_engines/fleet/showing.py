"""Show what becomes of each target: a table that lives on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from rich.live import Live
from rich.table import Table

from diffusion_engines.wording import console


class State(StrEnum):
    """How a target stands."""

    CURRENT = "current"
    PLANNED = "planned"
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    RESTORED = "restored"
    STALE = "stale"
    NOT_HERE = "not here"
    FAILED = "failed"
    STOPPED = "stopped"


MISSING = {*State} - {State.CURRENT, State.DONE, State.RESTORED}
_COLOURS = {
    State.RUNNING: "yellow",
    State.DONE: "green",
    State.RESTORED: "green",
    State.CURRENT: "green",
    State.FAILED: "red",
    State.STOPPED: "red",
    State.STALE: "magenta",
    State.NOT_HERE: "magenta",
}


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        state: how it stands.
        where: the machine that works on it, or did.
        what: the stage that runs, or why none does.
        seconds: that its worker took.
    """

    state: State
    where: str = ""
    what: str = ""
    seconds: float | None = None


@dataclass
class Board:
    """The rows by name, shown anew whenever one changes."""

    rows: dict[str, Row] = field(default_factory=dict)
    live: Live | None = None

    def put(self, name: str, row: Row) -> None:
        """Show a row, if it is another one than before."""
        if self.rows.get(name) == row:
            return
        self.rows[name] = row
        if self.live is not None:
            self.live.update(table_of(self.rows))
        else:
            parts = [time.strftime("%H:%M:%S"), f"{name:<12}", f"{row.state:<8}", row.where]
            first = next(iter(row.what.splitlines()), "")
            print(" ".join(filter(None, [*parts, first])).rstrip(), flush=True)


@contextmanager
def board() -> Iterator[Board]:
    """Show a board while a block runs; at its end the table stays."""
    if sys.stdout.isatty():
        with Live(table_of({}), console=console(), refresh_per_second=4) as live:
            yield Board(live=live)
        return
    shown = Board()
    try:
        yield shown
    finally:
        console().print(table_of(shown.rows))


def table_of(rows: Mapping[str, Row]) -> Table:
    """Return the table of a fleet."""
    table = Table(title="fleet")
    for column in ("target", "state", "where", "what", "s"):
        table.add_column(
            column,
            no_wrap=column in ("target", "state"),
            justify="right" if column == "s" else "left",
        )
    for name, row in rows.items():
        seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
        style = _COLOURS.get(row.state, "")
        state = f"[{style}]{row.state}[/]" if style else str(row.state)
        table.add_row(name, state, row.where, row.what, seconds)
    return table
