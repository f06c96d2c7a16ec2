"""Run ``dvc repro`` and say what came of it: what ``make repro`` and ``make measure`` do."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from rich.table import Table

from diffusion_engines.compose import compose_params
from diffusion_engines.dvc_cache import refuse_links
from diffusion_engines.errors import ConfigError
from diffusion_engines.failures import Failure, read_failures
from diffusion_engines.files import read_json
from diffusion_engines.layout import Workspace
from diffusion_engines.machines import MEASURE
from diffusion_engines.plan.planning import why_stages_run
from diffusion_engines.processes import death_with_parent, signal_handlers
from diffusion_engines.remotes.commands import fetch_before_run
from diffusion_engines.runs import composition, only_run
from diffusion_engines.stage import FAILURES
from diffusion_engines.why import WHY, write_why
from diffusion_engines.wording import console, some
from diffusion_engines.yaml_files import PARAMS, read_mapping

FAILURES_FOLDER = Path(".dvc/tmp/failures")
_WHY = Path(".dvc/tmp/why.json")
# Whose results belong to a machine, and the check that comes before.
_MEASURING = ("validate", "benchmark", "generate")
_SECONDS_BETWEEN_SIGNALS = 0.5


def reproduce(root: Path, overrides: Sequence[str]) -> None:
    """Compose, run every stage that has something to do, and print what came of it.

    Args:
        root: of the repository.
        overrides: Hydra's.

    Raises:
        BusyError: another run works there.
        ConfigError: ``conf/`` cannot be composed.
        SystemExit: something is left undone, or a signal ended it.
    """
    with only_run(root) as lock:
        with composition(root):
            changed = compose_params(list(overrides), root)
        print(f"params.yaml: {'composed anew' if changed else 'up to date'}", flush=True)
        _run_and_tell(root, lock, [], ())


def measure(root: Path, targets: Sequence[str]) -> None:
    """Time targets on this machine, whatever machine is on record, with params.yaml as it is.

    Args:
        root: of the repository.
        targets: of the section ``measure``.

    Raises:
        BusyError: another run works there.
        ConfigError: a target is not measured.
        SystemExit: something is left undone, or a signal ended it.
    """
    measured = read_mapping(root / PARAMS).get("measured") or {}
    if unknown := [target for target in targets if target not in measured]:
        raise ConfigError(
            f"{', '.join(unknown)} cannot be measured",
            expected=f"targets of the section measure: {', '.join(measured) or 'there are none'}",
            found=", ".join(targets),
            fix=f'`make params ARGS="measure=[{",".join(targets)}]"`, with your other overrides',
        )
    stages = [f"{stage}@{target}" for target in targets for stage in _MEASURING]
    with only_run(root) as lock:
        _run_and_tell(root, lock, [*stages, "report"], targets)


def _run_and_tell(root: Path, lock: int, stages: Sequence[str], asked: Sequence[str]) -> None:
    refuse_links(root)
    started = time.perf_counter()
    env = {WHY: str(root / _WHY), **({MEASURE: ",".join(asked)} if asked else {})}
    try:
        why = why_stages_run(root, asked)
        status, failures = 0, list[Failure]()
        if why is not None or stages:
            write_why(root / _WHY, why or {})
            pull = ["--pull"] if fetch_before_run(root) else []
            status, failures = _run_dvc(root, lock, [*pull, *stages], env)
        else:
            print("All is as `dvc repro` would leave it: nothing runs.")
    except _Stopped as stopped:
        print("\nstopped; `make repro` goes on from what was finished", file=sys.stderr)
        sys.exit(128 + stopped.number)
    if status:
        failed = [failure.stage for failure in failures]
        _print_failures(failures, stages_after(failed, root) if failed else set(), status)
        sys.exit(1)
    workspace = Workspace(root)
    if (summary := workspace.report / "fleet.json").is_file():
        _print_summary(workspace, read_json(summary), time.perf_counter() - started)


def _run_dvc(
    root: Path, lock: int, arguments: Sequence[str], env: Mapping[str, str]
) -> tuple[int, list[Failure]]:
    """Run all stages among ``arguments`` that can be run, all there are where none is named.

    Return dvc's exit status and what failed.

    dvc ends with this process, however that ends, and holds the lock as long as it lives.

    Raises:
        _Stopped: a person, or the system, wants this process to end; dvc has ended.
    """
    folder = root / FAILURES_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # Its own group, so that a signal from a terminal reaches dvc and its stage once, from here.
    with (
        subprocess.Popen(
            ["dvc", "repro", "--keep-going", *arguments],
            cwd=root,
            env={**os.environ, FAILURES: str(folder), **env},
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

    with signal_handlers({signal.SIGINT: end, signal.SIGTERM: end, signal.SIGTSTP: suspend}):
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
        print(f"{some(stages)} failed: {text}\n")
    waiting = [failure for failure in failures if failure.waits_for_hardware]
    if waiting:
        _print_waiting(waiting)
    if left:
        print(f"Stale, for they need what is missing: {some(sorted(left))}")
    if not failures:
        print(f"dvc repro failed with {status}; the message above says what to do.")
        if "error" in os.environ.get("PYTHONWARNINGS", ""):
            print("PYTHONWARNINGS=error makes errors of DVC's own warnings: run it without.")
    print("What was finished stays cached: `make repro` goes on from there.")


def _print_waiting(failures: Sequence[Failure]) -> None:
    table = Table(title="not for this machine")
    for column in ("target", "waits for", "not done"):
        table.add_column(column, no_wrap=column == "target")
    reasons = dict.fromkeys((failure.target, failure.expected) for failure in failures)
    for target, expected in reasons:
        stages = [f.stage for f in failures if (f.target, f.expected) == (target, expected)]
        table.add_row(target, expected, some(stages))
    console().print(table)
    print("Run `make repro` on such a machine, or `dvc pull` what one of them built and pushed.")


def _print_summary(workspace: Workspace, fleet: dict[str, Any], seconds: float) -> None:
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
    console().print(table)
    print(f"It took {seconds:.0f} s. To look at:")
    artifacts = workspace.artifacts
    for path, what in (
        (workspace.report / "index.html", "the report: open it in a browser"),
        (artifacts / "images", "what the engines paint, and how fast"),
        (artifacts / "bundles", "the engines, each with its manifest"),
        (artifacts / "onnx", "the ONNX graphs they were built from"),
    ):
        if path.exists():  # a fleet may measure nothing here
            print(f"  {path.relative_to(workspace.root)!s:<30} {what}")
