"""Say what runs, for how long, and what it needed: on the terminal, in CI logs, in the report."""

from __future__ import annotations

import contextlib
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")

# A CI log keeps every line, a terminal overwrites the last one.
_HEARTBEAT_SECONDS = 5.0 if sys.stderr.isatty() else 15.0


@dataclass
class Step:
    """A step that runs; ``now`` says what it is at, or waits for, while it is slow."""

    name: str
    now: Callable[[], str] = str


@dataclass
class StepLog:
    """Wall time and peak memory of the named steps of one stage.

    ``peak_memory_before`` is the largest peak, in bytes, of what ran before the current step.
    """

    steps: list[dict[str, float | str]] = field(default_factory=list)
    peak_memory_before: int = 0

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Run a block as a named step; a line appears at its end, and while it is slow."""
        running = Step(name)
        started = time.perf_counter()
        self.peak_memory_before = self.whole_peak_memory_bytes()
        _reset_peak_memory()
        done = threading.Event()
        heartbeat = threading.Thread(
            target=_report_slow_step, args=(running, started, done, sys.stderr), daemon=True
        )
        heartbeat.start()
        try:
            yield running
        finally:
            done.set()
            heartbeat.join()
        seconds, peak = time.perf_counter() - started, peak_memory_bytes()
        self.steps.append({"step": name, "seconds": round(seconds, 3), "peak_memory_bytes": peak})
        print(f"  {name:<44} {seconds:7.1f} s   peak {peak / 1e9:5.2f} GB", flush=True)

    def whole_peak_memory_bytes(self) -> int:
        """Return the peak resident memory of this process since it began, over all steps."""
        return max(self.peak_memory_before, peak_memory_bytes())


LOG = StepLog()
step = LOG.step


def _report_slow_step(
    running: Step, started: float, done: threading.Event, stream: TextIO | None
) -> None:
    # The stream of the step's start: a step may send what a library prints to a file.
    while not done.wait(_HEARTBEAT_SECONDS):
        elapsed = time.perf_counter() - started
        now = running.now()
        print(
            f"  {running.name} … {elapsed:.0f} s{': ' if now else ''}{now}", file=stream, flush=True
        )


def progress(items: Iterable[T], description: str, total: int | None = None) -> tqdm[T]:
    """Wrap an iterable in a progress bar: one line on a terminal, a line now and then in a log."""
    terminal = sys.stderr.isatty()
    return tqdm(
        items,
        desc=f"  {description}",
        total=total,
        file=sys.stderr if terminal else _LineStream(),
        mininterval=0.2 if terminal else _HEARTBEAT_SECONDS,
        delay=0.5 if terminal else _HEARTBEAT_SECONDS,
        dynamic_ncols=terminal,
        ncols=None if terminal else 80,
        leave=False,
    )


class _LineStream:
    """Writes what tqdm would draw over the last line as a line of its own."""

    def write(self, text: str) -> None:
        """Print what tqdm draws."""
        if line := text.strip("\r\n "):
            print(f"  {line}", file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Part of what tqdm asks of a file."""
        sys.stderr.flush()


def _reset_peak_memory() -> None:
    """Start a new peak, so that each step shows its own; Linux only, elsewhere it only grows."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process since the current step began."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
