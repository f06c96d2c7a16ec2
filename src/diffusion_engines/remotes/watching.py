"""Work that speaks with a remote, in a process of its own that is ended when the remote is silent.

The libraries beneath DVC wait for a server that accepts and does not answer for minutes or for
ever, each with timeouts of its own, and their threads cannot be stopped.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from diffusion_engines.errors import DiffusionEnginesError, RemoteError, first_line
from diffusion_engines.processes import death_with_parent

T = TypeVar("T")

# Seconds without a byte; with what a process takes to start, within a minute.
SILENCE = 40.0
_BETWEEN_BEATS = 0.5


@dataclass
class Pulse:
    """What tells the watching process that there is progress."""

    connection: Connection
    _last: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def beat(self, *_: object, **__: object) -> None:
        """Say that something came, or went; from the first time on silence counts."""
        with self._lock:  # a connection is for one thread at a time
            now = time.monotonic()
            if now - self._last > _BETWEEN_BEATS:
                self._last = now
                self.connection.send(None)


def watched(work: Callable[[Path, Pulse], T], root: Path, *, silence: float = SILENCE) -> T:
    """Return what ``work`` returns, from another process.

    Args:
        work: a function of a module; gets ``root`` and a pulse to be called with each progress.
        root: of the repository.
        silence: seconds without progress after which the process is ended.

    Raises:
        DiffusionEnginesError: ``work`` raised it.
        RemoteError: no progress for that long, or another exception of ``work``.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(work, root, theirs), daemon=True)
    process.start()
    theirs.close()
    limit: float | None = None  # it may have files to hash before it asks the remote
    try:
        while True:
            if not ours.poll(limit):
                raise RemoteError("the remote does not answer", found=f"{silence:.0f} s of silence")
            if (said := ours.recv()) is not None:
                break
            limit = silence
    except EOFError as error:
        process.join()
        raise RemoteError(
            "the transfer ended early", found=f"exit status {process.exitcode}"
        ) from error
    finally:
        process.kill()
        process.join()
        ours.close()
    if isinstance(said, DiffusionEnginesError):
        raise said
    result: T = said[0]
    return result


def _work(work: Callable[[Path, Pulse], object], root: Path, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this one
    if ask := death_with_parent():
        ask()
    said: Any
    try:
        said = (work(root, Pulse(connection)),)
    except DiffusionEnginesError as error:
        said = error
    except Exception as error:  # of whatever speaks the remote's protocol
        said = RemoteError("the remote failed", found=first_line(error))
    connection.send(said)
    # A thread that waits for the remote would keep this process; the parent ends it.
    connection.close()
