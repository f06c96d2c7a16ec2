"""Build a fleet: what all targets share once, then each target by a worker, then the report.

The graph is DVC's and the queue is Slurm's: a worker runs `dvc repro` for one target in a clone of
its own that has the repository's cache, and what it recorded is merged here.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from diffusion_engines.compose import compose_params
from diffusion_engines.dvc_cache import refuse_links
from diffusion_engines.errors import DiffusionEnginesError
from diffusion_engines.failures import Failure, failure_from_exception
from diffusion_engines.fleet.clones import make_clone
from diffusion_engines.fleet.launching import Launcher, Look
from diffusion_engines.fleet.local import LocalLauncher
from diffusion_engines.fleet.merging import Stages, merge_clone, read_stages
from diffusion_engines.fleet.settings import Local, Slurm, launcher_from_overrides
from diffusion_engines.fleet.showing import MISSING, Board, Row, State, board
from diffusion_engines.fleet.slurm import SlurmLauncher, cancel_left_over
from diffusion_engines.fleet.stages import REPORT, FleetPlan, TargetPlan, fleet_plan
from diffusion_engines.fleet.tasks import Desk, Record, Step, Task, read_record, write_task
from diffusion_engines.plan.planning import plan_run
from diffusion_engines.processes import signal_handlers, tail
from diffusion_engines.repro import stages_after
from diffusion_engines.runs import composition, only_run
from diffusion_engines.wording import some
from diffusion_engines.yaml_files import PARAMS

_FOLDER = Path(".fleet")
_SHARED = "shared"
# What is there is put in place, where there is no report to make.
_RESULTS = "results"
_SECONDS_BETWEEN_LOOKS = 0.3
_LOG_END = 1 << 16
# Whose outputs are in git, and not in the cache.
_PROBES = ("probe", "probe_machine")


def run_fleet(root: Path, overrides: Sequence[str], *, pull: bool = False) -> None:
    """Compose, build all targets that are missing, and show what came of each.

    Args:
        root: of the repository.
        overrides: Hydra's, of params.yaml and of the launcher.
        pull: whether DVC asks the remote for what the cache lacks.

    Raises:
        BusyError: another run works there.
        ConfigError: ``conf/`` cannot be composed.
        SystemExit: something is missing, or a signal ended it.
    """
    root = root.resolve()
    settings, rest = launcher_from_overrides(root / "conf", overrides)
    with only_run(root):
        with composition(root):
            changed = compose_params(rest, root)
        print(f"params.yaml: {'composed anew' if changed else 'up to date'}", flush=True)
        refuse_links(root)
        folder = root / _FOLDER
        cancel_left_over(folder)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with board() as shown, _stop_signals() as stop:
            fleet = _Fleet(root, folder, settings, rest, pull, shown, stop)
            fleet.run()
    fleet.tell()


@dataclass
class _Stop:
    """Whether somebody asked this process to end, by which signal."""

    number: int | None = None


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Note SIGINT and SIGTERM, so that what is being merged is merged whole."""
    stop = _Stop()

    def note(number: int, frame: FrameType | None) -> None:
        stop.number = number

    with signal_handlers({signal.SIGINT: note, signal.SIGTERM: note}):
        yield stop


@dataclass
class _Fleet:
    root: Path
    folder: Path
    settings: Local | Slurm
    overrides: Sequence[str]
    pull: bool
    board: Board
    stop: _Stop
    targets: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    failures: dict[str, Sequence[Failure]] = field(default_factory=dict)
    # Of targets that are built here, and not on the remote.
    unpushed: list[str] = field(default_factory=list)

    def run(self) -> None:
        params = yaml.safe_load((self.root / PARAMS).read_text())
        self.targets = [*params["targets"]]
        plan = self._plan(params)
        for name in self.targets:
            self.board.put(name, Row(State.PLANNED))
        lost: Collection[str] = ()
        if plan.shared and not self.stop.number:
            lost = self._share(plan)
            plan = self._plan(params)
        to_build = {
            name: target
            for name, target in plan.targets.items()
            if self._is_for_a_worker(name, target, lost)
        }
        if to_build and not self.stop.number:
            self._build(to_build)
        if not self.stop.number:
            self._finish(plan)
        for name in self.targets:
            row = self.board.rows[name]
            if self.stop.number and row.state in (State.PLANNED, State.QUEUED, State.RUNNING):
                self.board.put(name, Row(State.STOPPED, row.where))

    def tell(self) -> None:
        """Say what is missing and why; end with the status that says whether anything is.

        Raises:
            SystemExit: something is missing, or a signal ended it.
        """
        rows = self.board.rows
        reasons: dict[str, list[str]] = {}
        for name, failures in self.failures.items():
            for failure in failures:
                reasons.setdefault(failure.text, []).append(f"{name}: {failure.stage}")
        for text, stages in reasons.items():
            print(f"\n{some(stages)} failed: {text}")
        for name, row in rows.items():
            if row.state is State.FAILED and not self.failures.get(name):
                print(f"\n{name}: {row.what}")
                if text := tail(_end_of(Desk(self.folder / name).log), 10):
                    print(f"  the end of {_FOLDER / name / 'log.txt'}:\n{text}")
        if self.merged:
            print(
                "\nKeep what was recorded:\n"
                "  git add dvc.lock params.yaml artifacts/fingerprints artifacts/machines\n"
                '  git commit -m "Build the fleet"'
            )
        if self.stop.number:
            print("\nstopped; `make fleet` goes on from what was finished", file=sys.stderr)
            sys.exit(128 + self.stop.number)
        missing = [name for name, row in rows.items() if row.state in MISSING]
        if missing:
            sys.exit(f"\nmissing: {', '.join(f'{name} ({rows[name].state})' for name in missing)}")
        if self.unpushed:
            sys.exit(f"\nnot on the remote: {', '.join(self.unpushed)}. `dvc push` says why")

    def _plan(self, params: Mapping[str, Any]) -> FleetPlan:
        return fleet_plan(plan_run(self.root, self.overrides, pull=self.pull), params)

    def _share(self, plan: FleetPlan) -> Collection[str]:
        """Make what all targets share; return the stages that cannot be made for want of it."""
        record = self._run_here(_SHARED, [Step("build", self._repro(plan.shared))])
        self.merged += plan.shared
        if record is None or (record.failed and not record.failures):
            return {name for target in plan.targets.values() for name in target.names}
        failed = [failure.stage for failure in record.failures]
        return stages_after(failed, self.root) if failed else ()

    def _is_for_a_worker(self, name: str, plan: TargetPlan, lost: Collection[str]) -> bool:
        """Return whether a worker is to build a target; show why where none is."""
        row = None
        if self.stop.number:
            row = Row(State.STOPPED)
        elif needed := sorted(set(plan.names).intersection(lost)):
            row = Row(State.FAILED, "", f"{needed[0]} needs what could not be made")
        elif plan.blocked and isinstance(self.settings, Local) and not plan.to_do_here:
            row = Row(State.NOT_HERE, "", plan.blocked)
        elif plan.to_do:
            row = None
        elif not plan.blocked:
            row = Row(State.RESTORED if plan.restored else State.CURRENT)
        if row is not None:
            self.board.put(name, row)
        return row is None

    def _build(self, plans: Mapping[str, TargetPlan]) -> None:
        launcher: Launcher
        if isinstance(self.settings, Slurm):
            launcher, quiet = SlurmLauncher(self.settings, self.folder), None
        else:
            launcher, quiet = LocalLauncher(self.settings.jobs), str(self.folder / "quiet.lock")
        base, desks = read_stages(self.root), {}
        for name, plan in plans.items():
            if self.stop.number:
                break
            desk = Desk(self.folder / name)
            try:
                make_clone(self.root, desk.clone)
                write_task(desk, Task(str(desk.clone), self._steps(plan), quiet))
                launcher.submit(name, desk)
                desks[name] = desk
            except DiffusionEnginesError as error:
                self._refused(name, error)
        self._follow(launcher, desks, lambda name, look: self._ended(name, desks[name], look, base))

    def _refused(self, name: str, error: DiffusionEnginesError) -> None:
        self.failures[name] = [failure_from_exception(Failure("its job", name), error)]
        self.board.put(name, Row(State.FAILED, "", error.in_a_line))

    def _steps(self, plan: TargetPlan) -> list[Step]:
        steps = [Step("build", self._repro(plan.build))]
        if plan.measure:
            steps.append(Step("measure", self._repro(plan.measure)))
        if self._has_remote():
            steps.append(Step("push", ["push", *_cached(plan.names)]))
        return steps

    def _repro(self, stages: Sequence[str]) -> list[str]:
        return ["repro", "--keep-going", *(["--pull"] if self.pull else []), *stages]

    def _follow(
        self, launcher: Launcher, desks: Mapping[str, Desk], ended: Callable[[str, Look], None]
    ) -> None:
        left = set(desks)
        while left:
            if self.stop.number:
                launcher.stop()
            for name, look in launcher.look().items():
                if name not in left:
                    continue
                if look.state == "ended":
                    left.remove(name)
                    ended(name, look)
                else:
                    state = State.QUEUED if look.state == "queued" else State.RUNNING
                    what = look.note or stage_in(_end_of(desks[name].log))
                    self.board.put(name, Row(state, look.where, what))
            if left:
                time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _ended(self, name: str, desk: Desk, look: Look, base: Stages) -> None:
        record = read_record(desk)
        row = row_of(record, look, desk, stopped=self.stop.number is not None)
        try:
            changed, both = merge_clone(self.root, base, desk.clone, name)
        except (DiffusionEnginesError, OSError, yaml.YAMLError) as error:
            row = Row(State.FAILED, row.where, f"what it recorded cannot be merged: {error}")
        else:
            self.merged += changed
            if both:
                what = f"recorded otherwise by another worker, and so left to be made: {some(both)}"
                row = Row(State.FAILED, row.where, what, row.seconds)
        if record is not None:
            if row.state is State.FAILED:
                self.failures[name] = record.failures
            if record.failed == "push":
                self.unpushed.append(name)
        self.board.put(name, row)

    def _finish(self, plan: FleetPlan) -> None:
        rows = self.board.rows
        restored = [name for name in self.targets if rows[name].state is State.RESTORED]
        missing = [name for name in self.targets if rows[name].state in MISSING]
        steps = []
        if self.merged:
            # Also what workers found finished, as after a run that was stopped.
            recorded = read_stages(self.root)
            names = [n for target in plan.targets.values() for n in target.names if n in recorded]
            words = ["checkout", "--force", "--allow-missing", *_cached(names)]
            steps.append(Step("checkout", words))
        for name in restored:
            steps.append(Step("build", self._repro(plan.targets[name].names)))
        if missing:
            what = f"left as it was: it shows all targets, and {some(missing)} is missing"
            self.board.put(REPORT, Row(State.STALE, "", what))
        elif steps or plan.renews:
            # Alone: a probe here would look at this machine, and not at the worker's.
            steps.append(Step("report", ["repro", "--single-item", *plan.results]))
        else:
            self.board.put(REPORT, Row(State.CURRENT))
        if self._has_remote():
            steps.append(Step("push", ["push"]))
        if steps:
            name = _RESULTS if missing else REPORT
            record = self._run_here(name, steps)
            if record is not None and record.failed == "push":
                self.unpushed.append(name)

    def _run_here(self, name: str, steps: Sequence[Step]) -> Record | None:
        """Do steps in the repository itself; return what came of them."""
        desk = Desk(self.folder / name)
        write_task(desk, Task(str(self.root), steps))
        launcher = LocalLauncher(1)
        launcher.submit(name, desk)

        def ended(name: str, look: Look) -> None:
            record = read_record(desk)
            row = row_of(record, look, desk, stopped=self.stop.number is not None)
            if record is not None and row.state is State.FAILED:
                self.failures[name] = record.failures
            self.board.put(name, row)

        self._follow(launcher, {name: desk}, ended)
        return read_record(desk)

    def _has_remote(self) -> bool:
        from dvc.config import Config

        return bool(Config(dvc_dir=str(self.root / ".dvc"))["core"].get("remote"))


def row_of(record: Record | None, look: Look, desk: Desk, *, stopped: bool) -> Row:
    """Return how a worker ended.

    Args:
        record: that it left.
        look: its launcher's.
        desk: of it.
        stopped: whether a person ended it.
    """
    # A virtual node has a name of its own.
    where = look.where or (record.host if record else "")
    if record is not None and record.failed is None:
        return Row(State.DONE, where, _done(_end_of(desk.log)), record.seconds)
    if stopped:
        return Row(State.STOPPED, where)
    if record is None:
        return Row(State.FAILED, where, look.note or "its worker left no record")
    if record.failed == "push":
        return Row(State.DONE, where, f"built, and not pushed: {record.problem}", record.seconds)
    return _failed(record, where)


def _failed(record: Record, where: str) -> Row:
    if record.failures and all(failure.waits_for_hardware for failure in record.failures):
        expected = dict.fromkeys(failure.expected for failure in record.failures)
        what = f"waits for {some([*expected])}: {some([f.stage for f in record.failures])}"
        return Row(State.NOT_HERE, where, what, record.seconds)
    stages = [f"{failure.stage}: {failure.problem}" for failure in record.failures]
    return Row(State.FAILED, where, some(stages) or record.problem, record.seconds)


def stage_in(log: str) -> str:
    """Return the stage that runs, by DVC's log."""
    found = re.findall(r"^Running stage '([^']+)'", log, re.MULTILINE)
    return found[-1] if found else ""


def _done(log: str) -> str:
    found = set(re.findall(r"^Running stage '([^']+)'", log, re.MULTILINE))
    return f"ran {some(ran)}" if (ran := _cached(sorted(found))) else "nothing to run"


def _cached(stages: Collection[str]) -> list[str]:
    """Return the stages whose outputs are in the cache."""
    return [stage for stage in stages if stage.partition("@")[0] not in _PROBES]


def _end_of(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_END))
        return file.read().decode(errors="replace")
