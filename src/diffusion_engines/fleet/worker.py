"""Do one task in one clone: what a local process runs, and what a job of Slurm runs.

``python -m diffusion_engines.fleet.worker .fleet/rtx``
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffusion_engines.failures import read_failures
from diffusion_engines.fleet.tasks import (
    Desk,
    Record,
    Step,
    Task,
    read_task,
    write_record,
)
from diffusion_engines.processes import death_with_parent, describe_status

_BEAT_SECONDS = 2.0


def work(folder: Path) -> None:
    """Do the task of a desk, and leave a record of what came of it, whatever that is."""
    desk, started = Desk(folder), time.monotonic()
    with _beating(desk.beat):
        failed, problem = None, ""
        try:
            task = read_task(desk)
            for step in task.steps:
                failed = step.purpose
                if problem := _do(step, task, desk):
                    break
            else:
                failed = None
        except BaseException as error:  # of a time limit, of a full disk: said by the record
            problem = f"{type(error).__name__}: {error}"
            raise
        finally:
            write_record(
                desk,
                Record(
                    platform.node(),
                    round(time.monotonic() - started, 1),
                    failed if problem else None,
                    problem,
                    read_failures(desk.failures),
                ),
            )


def _do(step: Step, task: Task, desk: Desk) -> str:
    """Run a step; return what it failed of, nothing if it did not."""
    from diffusion_engines.stage import FAILURES  # loads for seconds, in which the beat goes

    shutil.rmtree(desk.failures, ignore_errors=True)
    desk.failures.mkdir(parents=True)
    paths = [str(Path(task.folder) / "src"), os.environ.get("PYTHONPATH", "")]
    # The code of the clone, whatever is edited meanwhile where this project is installed from.
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        FAILURES: str(desk.failures),
    }
    with (
        _quiet(task.quiet, alone=step.purpose == "measure"),
        desk.log.open("ab") as log,
        subprocess.Popen(
            ["dvc", *step.words],
            cwd=task.folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # libc is loaded before the fork, and nothing else is called.
            preexec_fn=death_with_parent(),  # noqa: PLW1509
        ) as dvc,
    ):
        try:
            status = dvc.wait()
        except BaseException:
            with suppress(ProcessLookupError):
                dvc.send_signal(signal.SIGTERM)
            raise
    return f"`dvc {step.words[0]}`: {describe_status(status)}" if status else ""


@contextmanager
def _quiet(path: str | None, *, alone: bool) -> Iterator[None]:
    if path is None:
        yield
        return
    with Path(path).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


@contextmanager
def _beating(path: Path) -> Iterator[None]:
    done = threading.Event()

    def beat() -> None:
        count = 0
        while not done.wait(_BEAT_SECONDS if count else 0):
            count += 1
            with suppress(OSError):  # a full disk is the steps' to say
                path.write_text(f"{count}\n")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
