"""Workers on a Slurm cluster: submitit hands them in, and we look after them.

submitit asks the accounting how a job ended; where there is none, it waits for ever for one that
left no result. So a job is judged by three things: the queue, the record that the worker leaves,
and its beat. A node that died is in the queue as before, for minutes.
"""

from __future__ import annotations

import getpass
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffusion_engines.errors import ConfigError, HardwareError
from diffusion_engines.files import read_json, write_json
from diffusion_engines.fleet.launching import Look
from diffusion_engines.fleet.settings import Slurm
from diffusion_engines.fleet.tasks import Desk
from diffusion_engines.fleet.worker import work

_COMMAND_SECONDS = 30
_BETWEEN_LOOKS = 2.0
# Slurm kills what does not end of itself (KillWait, 30 s).
_CANCEL_SECONDS = 40.0
# A record may come later to this machine than the end of its job, over a network's file system.
_RECORD_SECONDS = 10.0
_QUEUED = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"}
_RUNNING = {"RUNNING", "COMPLETING", "STAGE_OUT", "SUSPENDED", "STOPPED", "SIGNALING"}
# Reasons for which nothing may ever start it (man squeue, JOB REASON CODES).
_UNAVAILABLE = re.compile(r"DOWN|DRAINED|NotAvail|Inactive|BadConstraints|JobHeld|NodeDown")


@dataclass(frozen=True)
class QueueRow:
    """A job in Slurm's queue."""

    state: str
    nodes: str
    reason: str


def cancel_left_over(folder: Path) -> None:
    """Cancel the jobs of a fleet whose command was killed: their clones are about to go.

    Args:
        folder: of the fleet.
    """
    kept = folder / "jobs.json"
    if kept.is_file():
        cancel(read_json(kept))
        kept.unlink()


def cancel(numbers: list[str]) -> None:
    """Cancel jobs; one that has ended, or that Slurm has forgotten, is no error."""
    if numbers:
        _run(["scancel", "--quiet", *numbers])


def read_queue() -> dict[str, QueueRow] | None:
    """Return this user's jobs by number, those that ended lately included; None if none can say."""
    columns = "--format=%i|%T|%N|%r"
    user = f"--user={getpass.getuser()}"
    done = _run(["squeue", "--noheader", "--states=all", user, columns])
    if done is None or done.returncode:
        return None
    rows = [line.strip().split("|", 3) for line in done.stdout.splitlines() if "|" in line]
    return {row[0]: QueueRow(*row[1:]) for row in rows}


def _run(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_COMMAND_SECONDS
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None


@dataclass
class _Job:
    number: str
    desk: Desk
    beat: str = ""
    # On our clock: a node's may be another.
    alive: float = 0.0
    stuck: float | None = None
    gone: float | None = None
    look: Look = Look("queued")


@dataclass
class SlurmLauncher:
    """Jobs of one fleet.

    Attributes:
        settings: of ``conf/launcher/``.
        folder: of the fleet, where the numbers of its jobs are kept.
        queue: asks Slurm; None where it does not answer.
        clock: seconds.
    """

    settings: Slurm
    folder: Path
    queue: Callable[[], Mapping[str, QueueRow] | None] = read_queue
    clock: Callable[[], float] = time.monotonic
    _jobs: dict[str, _Job] = field(default_factory=dict)
    _looked: float | None = None

    def submit(self, name: str, desk: Desk) -> None:
        """Hand in a job for a target.

        Raises:
            ConfigError: Slurm refuses what the target asks for.
            HardwareError: there is no Slurm here, or no submitit.
        """
        number = _submit(name, desk, self.settings)
        self._jobs[name] = _Job(number, desk, alive=self.clock())
        self._keep()

    def look(self) -> dict[str, Look]:
        """Ask the queue, not more often than it likes, and return where everything stands."""
        now = self.clock()
        if self._looked is None or now - self._looked >= _BETWEEN_LOOKS:
            self._looked = now
            rows = self.queue()
            for job in self._jobs.values():
                if job.look.state != "ended":
                    job.look = self._look_at(job, rows, now)
            self._keep()
        return {name: job.look for name, job in self._jobs.items()}

    def stop(self) -> None:
        """Cancel what waits and what runs."""
        left = [job for job in self._jobs.values() if job.look.state != "ended"]
        cancel([job.number for job in left])
        for job in left:
            job.look = replace(job.look, state="ended", note="cancelled")
        self._keep()
        numbers, end = {job.number for job in left}, self.clock() + _CANCEL_SECONDS
        while self.clock() < end and any(
            row.state in _RUNNING
            for number, row in (self.queue() or {}).items()
            if number in numbers
        ):
            time.sleep(_BETWEEN_LOOKS / 4)  # what they record until then is merged

    def _look_at(self, job: _Job, rows: Mapping[str, QueueRow] | None, now: float) -> Look:
        if job.desk.record.is_file():
            return replace(job.look, state="ended", note="")
        if (beat := _text(job.desk.beat)) != job.beat:
            job.beat, job.alive = beat, now
        if rows is None:
            return self._silent(job, now, "Slurm does not answer, and the worker is silent")
        row = rows.get(job.number)
        if row is None or row.state not in _QUEUED | _RUNNING:
            return self._over(job, row, now)
        job.gone = None
        if row.state in _QUEUED:
            return self._queued(job, row, now)
        if job.look.state != "running":
            job.alive = now  # it has only begun
        job.look = Look("running", row.nodes)
        return self._silent(job, now, f"its worker on {row.nodes} is silent: the node died?")

    def _silent(self, job: _Job, now: float, what: str) -> Look:
        if job.look.state != "running" or now - job.alive < self.settings.patience_seconds:
            return job.look
        cancel([job.number])
        return Look("ended", job.look.where, f"{what} (for {now - job.alive:.0f} s)")

    def _queued(self, job: _Job, row: QueueRow, now: float) -> Look:
        if not _UNAVAILABLE.search(row.reason):
            job.stuck = None
            return Look("queued", "", "" if row.reason in ("None", "") else row.reason)
        if job.stuck is None:
            job.stuck = now
        if now - job.stuck < self.settings.patience_seconds:
            return Look("queued", "", row.reason)
        cancel([job.number])
        return Look("ended", "", f"no node for it is up: {row.reason}")

    def _over(self, job: _Job, row: QueueRow | None, now: float) -> Look:
        """Return how a job stands that Slurm has done with, and that left no record yet."""
        if job.gone is None:
            job.gone = now
        if now - job.gone < _RECORD_SECONDS:
            return job.look
        state = row.state if row else "no longer in the queue"
        where = (row.nodes if row else "") or job.look.where
        return Look("ended", where, f"job {job.number} is {state}, and its worker left no record")

    def _keep(self) -> None:
        left = [job.number for job in self._jobs.values() if job.look.state != "ended"]
        write_json(self.folder / "jobs.json", left)


def _submit(name: str, desk: Desk, settings: Slurm) -> str:
    try:
        import submitit
    except ImportError as error:
        raise HardwareError(
            "launcher=slurm needs submitit", fix="`pip install -e '.[slurm]' -c constraints.txt`"
        ) from error
    request = settings.request(name)
    asked = {
        "partition": request.partition,
        "constraint": request.constraint,
        "gres": request.gres,
        "cpus_per_task": request.cpus,
        "mem": f"{request.memory_gb}G" if request.memory_gb else None,
    }
    try:
        executor = submitit.SlurmExecutor(desk.folder / "slurm")
        executor.update_parameters(
            job_name=f"fleet-{name}",
            time=request.minutes,
            stderr_to_stdout=True,
            # A worker that lost its node is reported; the next `make fleet` goes on from there.
            additional_parameters={"no-requeue": True},
            **{key: value for key, value in asked.items() if value is not None},
        )
        return str(executor.submit(work, desk.folder).job_id)
    except submitit.core.utils.FailedJobError as error:
        raise ConfigError(
            f"Slurm refuses the job for {name}",
            expected="what the cluster has",
            found=str(error).strip().splitlines()[-1],
            fix=f"`sinfo -o '%P %f %G'` lists it; correct conf/launcher/slurm.yaml for {name}",
        ) from error
    except RuntimeError as error:  # of an executor without srun
        raise HardwareError(
            "there is no Slurm on this machine",
            expected="sbatch, srun and squeue",
            found=str(error),
        ) from error


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # not there yet, or being replaced
        return ""
