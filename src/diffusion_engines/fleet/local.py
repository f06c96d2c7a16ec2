"""Workers on this machine: so many processes at a time."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field

from diffusion_engines.fleet.launching import Look
from diffusion_engines.fleet.tasks import Desk
from diffusion_engines.processes import death_with_parent, describe_status

# For DVC and a stage to put down what they hold.
_GRACE_SECONDS = 5.0


@dataclass
class LocalLauncher:
    """A pool of processes, each the head of a group.

    Attributes:
        jobs: how many at a time.
    """

    jobs: int
    _waiting: dict[str, Desk] = field(default_factory=dict)
    _running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _ended: dict[str, Look] = field(default_factory=dict)

    def submit(self, name: str, desk: Desk) -> None:
        """Put a task at the end of the queue."""
        self._waiting[name] = desk

    def look(self) -> dict[str, Look]:
        """Start what there is room for, and return where everything stands."""
        here = platform.node()
        for name, process in [*self._running.items()]:
            if (status := process.poll()) is not None:
                del self._running[name]
                note = describe_status(status) if status else ""
                self._ended[name] = Look("ended", here, note)
        while self._waiting and len(self._running) < self.jobs:
            name = next(iter(self._waiting))
            self._running[name] = _start(self._waiting.pop(name))
        return {
            **{name: Look("queued") for name in self._waiting},
            **{name: Look("running", here) for name in self._running},
            **self._ended,
        }

    def stop(self) -> None:
        """End every group: politely, then not."""
        here = platform.node()
        self._ended |= {name: Look("ended", "", "not started") for name in self._waiting}
        self._waiting.clear()
        for process in self._running.values():
            _signal(process, signal.SIGTERM)
        end = time.monotonic() + _GRACE_SECONDS
        for name, process in self._running.items():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
            # Whoever of the group is left: a builder that ignores the signal and holds the GPU.
            _signal(process, signal.SIGKILL)
            self._ended[name] = Look("ended", here, describe_status(process.wait()))
        self._running.clear()


def _start(desk: Desk) -> subprocess.Popen[bytes]:
    with desk.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "diffusion_engines.fleet.worker", str(desk.folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
            # A live table has a thread; libc is loaded before the fork, and nothing else is called.
            preexec_fn=death_with_parent(),  # noqa: PLW1509
        )


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
