"""Who works in a workspace: our runs by a lock, those of DVC by its own record of them.

Parameters must not change under a run: DVC hashes params.yaml when a stage has ended, and would
record a result under what stands there then.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusion_engines.errors import BusyError

_LOCK = Path(".dvc/tmp/repro.lock")
# DVC's: held while it reads, hashes and writes, and released while a stage's command runs.
_DVC_LOCK = Path(".dvc/tmp/lock")
# DVC's: the paths that running stages read and write, each with the pid of its dvc, from before a
# stage's command until its results are hashed (dvc/rwlock.py).
_DVC_RECORD = Path(".dvc/tmp/rwlock")
_READ_SECONDS = 1.0


@contextmanager
def only_run(root: Path) -> Iterator[int]:
    """Hold the workspace for one `make repro`; yield the lock's file descriptor.

    A child that inherits the descriptor holds the lock too, as long as it lives.

    Raises:
        BusyError: another run holds it.
    """
    with held(root / _LOCK, lambda pid: _busy(root, pid, "make repro")) as lock:
        yield lock


@contextmanager
def held(path: Path, busy: Callable[[int | None], BusyError]) -> Iterator[int]:
    """Hold a lock, in a file with this process's pid; yield its file descriptor.

    The kernel releases it with the process, however that ends.

    Args:
        path: of the file.
        busy: makes the error, of the pid that holds the lock; None: it is not known.

    Raises:
        BusyError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy(_pid_in(path)) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield lock.fileno()


@contextmanager
def composition(root: Path) -> Iterator[None]:
    """Hold DVC's lock while params.yaml is composed: no stage begins or ends meanwhile.

    Raises:
        BusyError: a run works in this workspace.
    """
    from dvc.lock import LockError, make_lock

    refuse_during_a_run(root)
    path = root / _DVC_LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with make_lock(str(path)):
            refuse_during_a_run(root)  # a stage may have begun while this waited
            yield
    except LockError as error:
        raise _busy(root, _pid_in(path), "dvc") from error


def refuse_during_a_run(root: Path) -> None:
    """Return if parameters may change now.

    Raises:
        BusyError: a `make repro` other than this process, or a stage under DVC, runs.
    """
    path = root / _LOCK
    if (pid := _pid_in(path)) != os.getpid() and is_locked(path):
        raise _busy(root, pid, "make repro")
    for pid, command in dvc_processes(root).items():
        if pid != os.getpid() and _is_alive(pid):
            raise _busy(root, pid, command)


def dvc_processes(root: Path) -> dict[int, str]:
    """Return the pids and commands that DVC recorded as running a stage; a killed one stays there.

    Empty where there is no record.
    """
    record = _dvc_record(root / _DVC_RECORD)
    readers = [reader for readers in record.get("read", {}).values() for reader in readers]
    return {entry["pid"]: entry["cmd"] for entry in (*readers, *record.get("write", {}).values())}


def started_by_dvc(root: Path) -> bool:
    """Return whether a process that runs a stage in ``root`` now is an ancestor of this one.

    Not so where that one was killed: who adopts its children, often process 1, runs no stage. But
    process 1 of a container may be dvc itself.
    """
    import psutil

    recorded = dvc_processes(root)
    return any(parent.pid in recorded for parent in psutil.Process().parents())


def _dvc_record(path: Path) -> dict[str, Any]:
    end = time.monotonic() + _READ_SECONDS
    while True:
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError:  # DVC truncates the file and then writes it
            if time.monotonic() > end:
                return {}
            time.sleep(0.02)


def _is_alive(pid: int) -> bool:
    import psutil

    try:
        # One that has ended stays as a zombie until its parent, or who adopted it, asks for it.
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock: the kernel says so, and no file."""
    try:
        with path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _pid_in(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _busy(root: Path, pid: int | None, command: str) -> BusyError:
    return BusyError(
        "another run works in this folder: its results would be recorded under other parameters",
        expected="one run at a time",
        found=f"process {pid or 'unknown'}: {command}",
        fix="wait for it; or work in a second clone that shares the cache:\n"
        f"`dvc cache dir --local {(root / '.dvc/cache').resolve()}`",
    )
