"""Compose ``conf/``, run ``dvc repro`` and say what came of it: what ``make repro`` does.

``python -m diffusion_engines.repro [hydra overrides]``
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

from diffusion_engines import layout
from diffusion_engines.compose import compose_params
from diffusion_engines.errors import DiffusionEnginesError
from diffusion_engines.failures import Failure, read_failures
from diffusion_engines.processes import death_with_parent
from diffusion_engines.runs import composition, only_run
from diffusion_engines.stage import FAILURES

_FAILURES = Path(".dvc/tmp/failures")
_SHOWN_STAGES = 6
_SECONDS_BETWEEN_SIGNALS = 0.5


def main() -> None:
    """Run the whole pipeline; exit with 1 where anything is left undone."""
    root = Path.cwd()
    try:
        with only_run(root) as lock:
            with composition(root):
                changed = compose_params(sys.argv[1:], root)
            print(f"params.yaml: {'composed anew' if changed else 'up to date'}", flush=True)
            started = time.perf_counter()
            status, failures = _run_dvc(root, lock)
            left = (
                stages_after([failure.stage for failure in failures], root) if failures else set()
            )
    except DiffusionEnginesError as error:
        sys.exit(str(error))
    except _Stopped as stopped:
        print("\nstopped; `make repro` goes on from what was finished", file=sys.stderr)
        sys.exit(128 + stopped.number)
    if status:
        _print_failures(failures, left, status)
        sys.exit(1)
    summary = layout.REPORT / "fleet.json"
    if summary.is_file():
        _print_summary(json.loads(summary.read_text()), time.perf_counter() - started)


def _run_dvc(root: Path, lock: int) -> tuple[int, list[Failure]]:
    """Run every stage that can be run; return dvc's exit status and what failed.

    dvc ends with this process, however that ends, and holds the lock as long as it lives.

    Raises:
        _Stopped: a person, or the system, wants this process to end; dvc has ended.
    """
    folder = root / _FAILURES
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # Its own group, so that a signal from a terminal reaches dvc and its stage once, from here.
    with (
        subprocess.Popen(
            ["dvc", "repro", "--keep-going"],
            cwd=root,
            env=os.environ | {FAILURES: str(folder)},
            pass_fds=[lock],
            process_group=0,
            preexec_fn=death_with_parent(),  # noqa: PLW1509 - no threads here
        ) as dvc,
        _signals_for(dvc),
    ):
        status = dvc.wait()
    return status, read_failures(folder)


class _Stopped(BaseException):
    """This process was asked to end, by signal ``number``."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def _signals_for(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Hand what a terminal or a system sends to this process on to the group of ``process``.

    Raises:
        _Stopped: SIGINT or SIGTERM came; the process has ended.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise _Stopped(number)

    def suspend(number: int, frame: FrameType | None) -> None:
        os.killpg(process.pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        os.killpg(process.pid, signal.SIGCONT)

    handlers = {signal.SIGINT: end, signal.SIGTERM: end, signal.SIGTSTP: suspend}
    # What is ignored stays ignored: a shell's background jobs have no Ctrl-C.
    before = {
        number: signal.signal(number, handler)
        for number, handler in handlers.items()
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    except _Stopped as stopped:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, stopped.number)
        # dvc ignores SIGINT while a stage runs, and would go on with the next one.
        while True:
            try:
                process.wait(_SECONDS_BETWEEN_SIGNALS)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(stopped.number)
            except _Stopped:  # a second time: now
                process.kill()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stages_after(stages: Iterable[str], root: Path) -> set[str]:
    """Return the stages of dvc.yaml that need one of ``stages``, directly or not."""
    import networkx as nx
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        needs = nx.DiGraph((stage.name, other.name) for stage, other in repo.index.graph.edges)
    failed = {stage for stage in stages if stage in needs}
    return {after for stage in failed for after in nx.ancestors(needs, stage)} - failed


def _print_failures(failures: Sequence[Failure], left: set[str], status: int) -> None:
    """Say what is left undone and why: each reason once, what needs other hardware as a table."""
    print()
    others: dict[str, list[str]] = {}
    for failure in failures:
        if not failure.waits_for_hardware:
            others.setdefault(failure.text, []).append(failure.stage)
    for text, stages in others.items():
        print(f"{_some(stages)} failed: {text}\n")
    waiting = [failure for failure in failures if failure.waits_for_hardware]
    if waiting:
        _print_waiting(waiting)
    if left:
        print(f"Stale, for they need what is missing: {_some(sorted(left))}")
    if not failures:
        print(f"dvc repro failed with {status}; the message above says what to do.")
    print("What was finished stays cached: `make repro` goes on from there.")


def _print_waiting(failures: Sequence[Failure]) -> None:
    table = Table(title="not for this machine")
    for column in ("target", "waits for", "not done"):
        table.add_column(column, no_wrap=column == "target")
    reasons = dict.fromkeys((failure.target, failure.expected) for failure in failures)
    for target, expected in reasons:
        stages = [f.stage for f in failures if (f.target, f.expected) == (target, expected)]
        table.add_row(target, expected, _some(stages))
    _console().print(table)
    print("Run `make repro` on such a machine, or `dvc pull` what one of them built and pushed.")


def _some(stages: Sequence[str]) -> str:
    shown = ", ".join(stages[:_SHOWN_STAGES])
    more = len(stages) - _SHOWN_STAGES
    return f"{shown} and {more} more" if more > 0 else shown


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 124)


def _print_summary(fleet: dict[str, Any], seconds: float) -> None:
    weights = " + ".join([fleet["model"], *fleet["loras"]])
    table = Table(title=f"{weights}{' (synthetic weights)' if fleet['synthetic'] else ''}")
    for column in ("engine", "backend", "precision", "MB", "build s", "parity", "speed"):
        table.add_column(
            column,
            justify="right" if column in ("MB", "build s") else "left",
            no_wrap=column == "engine",  # its name is what the next command takes
        )
    for row in fleet["engines"]:
        table.add_row(
            row["name"],
            row["builder"],
            row["precision"],
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['build_seconds']:.1f}",
            row["parity"],
            row["speed"],
        )
    _console().print(table)
    print(f"dvc repro took {seconds:.0f} s. To look at:")
    for path, what in (
        (layout.REPORT / "index.html", "the report: open it in a browser"),
        (layout.ARTIFACTS / "images", "what the engines paint, and how fast"),
        (layout.ARTIFACTS / "bundles", "the engines, each with its manifest"),
        (layout.ARTIFACTS / "onnx", "the ONNX graphs they were built from"),
    ):
        if path.exists():  # a fleet may measure nothing here
            print(f"  {path!s:<30} {what}")


if __name__ == "__main__":
    main()
