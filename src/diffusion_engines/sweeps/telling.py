"""What a person sees of a sweep while it runs, and its table at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from diffusion_engines.sweeps.fronts import Points
from diffusion_engines.sweeps.measured import Numbers, PointResult
from diffusion_engines.sweeps.work import Space


@dataclass
class Teller:
    """Says what happens: a line when a point starts and ends, and a bar where there is a terminal.

    Attributes:
        console: where.
        progress: the bar.
    """

    console: Console
    progress: Progress = field(init=False)
    total: int = 0
    finished: int = 0

    def __post_init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            auto_refresh=False,  # by a thread, beside which no process may be forked
            disable=not self.console.is_terminal,
        )

    def planning(self, count: int) -> None:
        """Say that points are looked at before any runs."""
        self._print(f"{count} points: composed and checked; what would they run?")

    def nothing_to_do(self) -> None:
        """Say that all points have their results."""
        self._print("every point has its result already, and nothing has changed since")

    def starting(self, count: int, jobs: int, space: Space) -> None:
        """Say what is to run, and the space that it takes."""
        self.total = count
        unknown = f", and {space.unknown} stages of unknown size" if space.unknown else ""
        self._print(
            f"{count} to run, {jobs} at a time; at most {space.cache / 1e9:.2f} GB of results and "
            f"{space.workspaces / 1e9:.2f} GB of working copies{unknown}"
        )

    def started(self, name: str) -> None:
        """Say that a point runs."""
        self._print(f"{time.strftime('%H:%M:%S')}  {name}  runs")

    def shows(self, stages: Mapping[str, str]) -> None:
        """Show the stage that each running point is at."""
        if self.progress.disable:
            return
        text = "   ".join(f"{name}: {stage}" for name, stage in stages.items())
        if not self.progress.task_ids:
            self.progress.add_task(text, total=self.total)
        self.progress.update(
            self.progress.task_ids[0],
            description=text,
            completed=self.finished,
            total=self.total,
            refresh=True,
        )

    def ended(self, result: PointResult) -> None:
        """Say how a point ended."""
        self.finished += 1
        what = _summary(result.numbers) if result.numbers else ""
        error = f": {result.error}" if result.error else ""
        self._print(
            f"{time.strftime('%H:%M:%S')}  {result.name}  {result.state} in "
            f"{result.seconds:.0f} s{f', {what}' if what else ''}{error}"
        )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the bar on the terminal while a block runs."""
        with self.progress:
            yield

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def _summary(numbers: Numbers) -> str:
    return f"{numbers.latency_ms:.4g} ms, error {numbers.error:.1e}, {numbers.size_mb:.4g} MB"


def table_of(points: Points, failed: Sequence[PointResult] = ()) -> Table:
    """Return a row per point of a sweep, with its numbers or why it has none.

    Args:
        points: that were measured, with what was chosen of them.
        failed: those that were not.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("point", no_wrap=True)
    table.add_column("state")
    for name in ("ms", "speed", "error", "latents", "PSNR", "MB", "peak MB"):
        table.add_column(name, justify="right")
    table.add_column("", overflow="fold", ratio=1)
    for result, numbers in points.measured:
        cells = [
            f"{numbers.latency_ms:.4g}",
            f"{numbers.speedup:.2f}×",
            f"{numbers.error:.1e}",
            f"{numbers.latents_rel_l2:.1e}",
            f"{numbers.psnr:.1f}",
            f"{numbers.size_mb:.4g}",
            f"{numbers.memory_mb:.4g}",
        ]
        notes = ", ".join(points.notes(result.name))
        table.add_row(result.name, result.state, *cells, notes or result.error)
    for result in failed:
        table.add_row(result.name, result.state, *["-"] * 7, result.error)
    return table
