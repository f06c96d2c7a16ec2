"""A sweep for a person: run it, show its table, and write its page."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from diffusion_engines.errors import ConfigError
from diffusion_engines.sweeps.fronts import Points, read_rules
from diffusion_engines.sweeps.measured import (
    SWEEPS,
    PointResult,
    SweepRecord,
    results_of,
    write_sweep,
)
from diffusion_engines.sweeps.page import write_page
from diffusion_engines.sweeps.points import compose_sweep
from diffusion_engines.sweeps.running import Stopped, run_sweep
from diffusion_engines.sweeps.telling import Teller, table_of
from diffusion_engines.wording import console

# A part of the names of experiments, which are git's refs.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


def sweep(
    root: Path,
    file: str,
    given: Sequence[str],
    *,
    jobs: int = 1,
    target: str | None = None,
    name: str | None = None,
) -> bool:
    """Run a sweep to its end; return whether every point is built, and within the gates.

    Args:
        root: of the repository.
        file: of ``conf/sweep/``.
        given: overrides besides.
        jobs: how many points run at a time.
        target: whose measurements are compared; None: the one that is measured.
        name: of its folder and experiments; None: that of the file.

    Raises:
        DiffusionEnginesError: a point is not valid, the disk is too small, another sweep runs.
        SystemExit: a signal ended it; the same command goes on.
    """
    out = console()
    if not _NAME.fullmatch(name or file):
        raise ConfigError(
            f"a sweep cannot be called {name or file!r}",
            expected="letters, digits, _ and -, as in the name of an experiment",
            found=name or file,
            fix="`--name NAME` gives it another one",
        )
    composed = compose_sweep(root, name or file, given, file=file, target=target)
    folder = root / SWEEPS / composed.name
    points = tuple((point.name, point.overrides, point.key) for point in composed.points)
    options = ["--name", name] if name else []
    options += ["--target", target] if target else []
    command = ["diffusion-engines", "sweep", file, *given, *options]
    record = SweepRecord(composed.name, composed.target, points, shlex.join(command))
    write_sweep(record, folder)
    teller = Teller(out)
    try:
        with teller.watching():
            run_sweep(root, composed, folder, jobs, teller)
    except Stopped as stopped:
        print("\nstopped; the same command goes on from what was finished", file=sys.stderr)
        sys.exit(128 + stopped.number)
    results = results_of(folder, record)
    shown = points_of(results, root)
    out.print(table_of(shown, [result for result in results if result.numbers is None]))
    write_page(folder / "index.html", record, shown, results)
    print(f"The page, with the fronts: {folder.relative_to(root) / 'index.html'}")
    return all(result.state == "done" for result in results) and len(results) == len(points)


def points_of(results: Sequence[PointResult], root: Path) -> Points:
    """Return the measured ones of a sweep's points, with the rules of ``conf/pick/``."""
    measured = tuple((one, one.numbers) for one in results if one.numbers is not None)
    return Points(measured, read_rules(root))
