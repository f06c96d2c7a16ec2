"""Run the points of a sweep to the end, several at a time, each in a process group of its own.

Nothing is kept but what has ended: a point is done where its result is there, runs where the sweep
that holds the lock says so, and waits otherwise. So no kill leaves one that seems to run, and the
same command goes on: DVC's cache has every stage that ended.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

import yaml

from diffusion_engines.backends import backend
from diffusion_engines.backends.targets import target_from_settings
from diffusion_engines.dvc_cache import cache_folder
from diffusion_engines.errors import BusyError, DiffusionEnginesError
from diffusion_engines.failures import read_failures
from diffusion_engines.layout import Workspace
from diffusion_engines.machines import check_record, keep_or_write_record
from diffusion_engines.processes import death_with_parent, describe_status, signal_handlers, tail
from diffusion_engines.repro import FAILURES_FOLDER, stages_after
from diffusion_engines.runs import held, is_locked
from diffusion_engines.sweeps.clones import (
    Start,
    make_clone,
    read_start,
    save_experiment,
    variables,
)
from diffusion_engines.sweeps.measured import PointResult, read_point, result_of, write_point
from diffusion_engines.sweeps.points import Point, Sweep
from diffusion_engines.sweeps.telling import Teller
from diffusion_engines.sweeps.work import (
    PointWork,
    Space,
    check_space,
    shares_files,
    space_of,
    startable,
    work_of,
)
from diffusion_engines.turns import TURNS

_CLONES = Path(".dvc/tmp/sweep")
_LOCK = Path(".dvc/tmp/sweep.lock")
_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_BETWEEN_SIGNALS = 0.5


@dataclass
class _Run:
    """A point that runs."""

    point: Point
    process: subprocess.Popen[bytes]
    clone: Path
    log: Path
    started: float


@dataclass
class _State:
    """The sweep as it stands."""

    waiting: list[str]
    works: Mapping[str, PointWork]
    running: dict[str, _Run] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)


def run_sweep(root: Path, sweep: Sweep, folder: Path, jobs: int, teller: Teller) -> None:
    """Run every point of a sweep that has no result yet.

    Args:
        root: of the repository.
        sweep: its points, composed and checked.
        folder: gets their results and logs.
        jobs: how many run at a time.
        teller: hears what happens.

    Raises:
        BusyError: another sweep runs in this repository.
        ConfigError: there is no commit to start from.
        HardwareError: the disk has no room for it; what has ended is kept.
        Stopped: a person, or the system, wants this process to end; every point has ended.
    """
    root = root.resolve()
    with _only_sweep(root):
        teller.planning(len(sweep.points))
        works = {point.name: work_of(root, point.params) for point in sweep.points}
        done = [p.name for p in sweep.points if is_done(read_point(folder, p.name), p, works)]
        waiting = [point.name for point in sweep.points if point.name not in done]
        points = {point.name: point for point in sweep.points}
        if not waiting:
            teller.nothing_to_do()
            return
        jobs = min(jobs, len(waiting))
        space = _check(root, sweep.name, [works[name] for name in waiting], jobs)
        _check_machine(root, sweep.target, points[waiting[0]], [works[name] for name in waiting])
        teller.starting(len(waiting), jobs, space)
        start = read_start(root, set().union(*(work.carried for work in works.values())))
        state = _State(waiting, works)
        with _clones(start, root / _CLONES, jobs) as clones:
            _run_all(state, points, sweep, folder, start, clones, teller)


def is_done(result: PointResult | None, point: Point, works: Mapping[str, PointWork]) -> bool:
    """Whether a point need not run again.

    It ended with these parameters, in numbers, and nothing would run now but the stages that a gate
    stopped: no code, library or machine has changed since, and the cache has what it made.
    """
    if result is None or result.key != point.key or result.state == "failed":
        return False
    return works[point.name].runs <= set(result.left)


def _check(
    root: Path, name: str, works: Sequence[PointWork], jobs: int, made: Collection[str] = ()
) -> Space:
    cache, copies = cache_folder(root), root / _CLONES
    space = space_of(works, jobs, shared=shares_files(cache, copies), made=made)
    check_space(space, cache, copies, f"the sweep {name}")
    return space


def _check_machine(root: Path, target: str, point: Point, works: Sequence[PointWork]) -> None:
    """Have a record of the machine that the points are timed on, one for all of them.

    Raises:
        HardwareError: the target cannot be timed here, or its record names another machine.
    """
    if not any(
        stage.is_open and stage.name == f"benchmark@{target}"
        for work in works
        for stage in work.stages
    ):
        return
    record = Workspace(root).machine(target)
    if record.is_file():
        check_record(target, record)
        return
    settings = target_from_settings(yaml.safe_load(point.params)["targets"][target])
    keep_or_write_record(
        target, record, lambda: backend(settings.backend).check_hardware(settings), asked=False
    )


def _run_all(
    state: _State,
    points: Mapping[str, Point],
    sweep: Sweep,
    folder: Path,
    start: Start,
    clones: Sequence[Path],
    teller: Teller,
) -> None:
    free = list(clones)
    turns = clones[0].parent / "turns" if len(clones) > 1 else None
    with _stopping(state):
        while state.waiting or state.running:
            for run in [run for run in state.running.values() if run.process.poll() is not None]:
                result = _finished(run, sweep, start)
                write_point(result, folder)
                state.made |= state.works[run.point.name].open
                del state.running[run.point.name]
                free.append(run.clone)
                teller.ended(result)
            while free and (
                name := startable(state.waiting, state.running, state.works, state.made)
            ):
                # Another sweep, or anything else, may have taken the room since.
                _check(start.root, sweep.name, [state.works[name]], 0, state.made)
                log = folder / "logs" / f"{name}.log"
                state.running[name] = _started(points[name], free.pop(0), log, turns)
                state.waiting.remove(name)
                teller.started(name)
            teller.shows({name: _stage(run.log) for name, run in state.running.items()})
            time.sleep(_SECONDS_BETWEEN_LOOKS)


def _started(point: Point, clone: Path, log: Path, turns: Path | None) -> _Run:
    log.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(clone / FAILURES_FOLDER, ignore_errors=True)  # of the point before
    env = {**variables(clone), **({TURNS: str(turns)} if turns else {})}
    with log.open("wb") as output:
        process = _spawn(point, clone, env, output)
    return _Run(point, process, clone, log, time.monotonic())


def _spawn(
    point: Point, clone: Path, env: Mapping[str, str], output: IO[bytes]
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "diffusion_engines.cli", "repro", *point.overrides]
    # Its own group, so that a signal from a terminal reaches it once, from here.
    return subprocess.Popen(
        command,
        cwd=clone,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=dict(env),
        process_group=0,
        preexec_fn=death_with_parent(),  # noqa: PLW1509 - no threads here
    )


def _finished(run: _Run, sweep: Sweep, start: Start) -> PointResult:
    """Return how a point ended, having kept it as an experiment where it ended well."""
    status = run.process.returncode
    failures = read_failures(run.clone / FAILURES_FOLDER)
    after = stages_after([failure.stage for failure in failures], run.clone) if failures else set()
    ended = ""
    if status and not failures:
        said = tail(run.log.read_text(errors="replace"), 3)
        ended = f"{describe_status(status)}: {' '.join(said.split())}"
    elif not failures:
        try:
            save_experiment(start, run.clone, run.point.name)
        except DiffusionEnginesError as error:
            ended = error.in_a_line + (f": {error.found}" if error.found else "")
    return result_of(
        run.clone,
        (run.point.name, run.point.overrides, run.point.key),
        sweep.target,
        failures,
        after,
        ended=ended,
        seconds=time.monotonic() - run.started,
    )


def _stage(log: Path) -> str:
    """Return the stage that a run is at, by what DVC printed last."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 20_000))
        if found := re.findall(rb"Running stage '([^']+)'", file.read()):
            return bytes(found[-1]).decode()
    return "composing"


@contextmanager
def _clones(start: Start, folder: Path, count: int) -> Iterator[list[Path]]:
    """Yield working copies; they are removed, and what a killed sweep left of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield [make_clone(start, folder / f"worker-{index}") for index in range(count)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _only_sweep(root: Path) -> Iterator[None]:
    def busy(pid: int | None) -> BusyError:
        return BusyError(
            "another sweep runs in this repository",
            expected="one at a time",
            found=f"process {pid or 'unknown'}",
            fix="wait for it; its points are in `make experiments`",
        )

    with held(root / _LOCK, busy):
        yield


def is_swept(root: Path) -> bool:
    """Whether a sweep runs in this repository now: the kernel says so, and no file."""
    return is_locked(root / _LOCK)


class Stopped(BaseException):
    """This process was asked to end, by signal ``number``."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def _stopping(state: _State) -> Iterator[None]:
    """Hand what a terminal or a system sends to this process on to every point that runs.

    However the block ends, no point outlives it.

    Raises:
        Stopped: SIGINT or SIGTERM came.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    def suspend(number: int, frame: FrameType | None) -> None:
        processes = [run.process for run in state.running.values()]
        for process in processes:
            process.send_signal(signal.SIGTSTP)
        os.kill(os.getpid(), signal.SIGSTOP)
        for process in processes:
            process.send_signal(signal.SIGCONT)

    with signal_handlers({signal.SIGINT: end, signal.SIGTERM: end, signal.SIGTSTP: suspend}):
        try:
            yield
        finally:
            _end([run.process for run in state.running.values()])


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End runs: each hands the signal on to dvc and its stage. A second signal to us: at once."""
    for process in processes:
        process.terminate()
    for process in processes:
        while process.poll() is None:
            try:
                process.wait(_SECONDS_BETWEEN_SIGNALS)
            except subprocess.TimeoutExpired:
                continue
            except Stopped:
                # The kernel ends what they started with them.
                for other in processes:
                    other.kill()
