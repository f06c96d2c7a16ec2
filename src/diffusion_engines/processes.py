"""Run a program of somebody else: its output kept, its failure an error with the log's tail."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from diffusion_engines.errors import BuildError

Handler = Callable[[int, FrameType | None], object]

_TAIL_LINES = 25
# 128 + n is how shells and launchers report a program that signal n ended
_SHELL_SIGNAL = 128


@contextmanager
def signal_handlers(handlers: Mapping[int, Handler]) -> Iterator[None]:
    """Within it, signals are handled so; what is ignored stays ignored.

    A shell's background jobs have no Ctrl-C.
    """
    before = {
        number: signal.signal(number, handler)
        for number, handler in handlers.items()
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_logged(
    command: Sequence[str | Path],
    log: Path,
    *,
    what: str,
    fix: str,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run a command with its output in ``log``; return the output.

    Args:
        command: program and arguments.
        log: gets standard output and standard error, after the command line.
        what: for the error, e.g. "trtexec, building unet".
        fix: what to do when it fails.
        env: variables besides those of this process.

    Raises:
        BuildError: it could not be started, ended with another status than 0, or crashed.
    """
    words = [str(word) for word in command]
    with log.open("w") as file:
        file.write(f"$ {' '.join(words)}\n")
        file.flush()
        try:
            status = run_into(file, words, env=env)
        except OSError as error:
            raise BuildError(
                f"{what}: {words[0]} could not be started", found=str(error), fix=fix
            ) from error
    output = log.read_text(errors="replace")
    if status:
        raise BuildError(
            f"{what} failed",
            expected="exit status 0",
            found=f"{describe_status(status)}; the end of its log:\n{tail(output)}",
            fix=fix,
        )
    return output


def run_into(
    file: IO[str],
    words: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    limit: float | None = None,
) -> int:
    """Run a command that reads nothing and writes all into a file; return its exit status.

    It ends with this process.

    Args:
        file: open for writing.
        words: program and arguments.
        env: variables besides those of this process.
        limit: seconds after which it is ended.

    Raises:
        OSError: it could not be started.
        subprocess.TimeoutExpired: it was ended.
    """
    return subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=subprocess.STDOUT,
        env=os.environ | dict(env or {}),
        check=False,
        timeout=limit,
        preexec_fn=death_with_parent(),
    ).returncode


def describe_status(status: int) -> str:
    """Say how a process ended: ``exit status 1``, ``killed by SIGSEGV (a crash)``."""
    number = -status if status < 0 else status - _SHELL_SIGNAL
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"exit status {status}"
    crash = number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
    return f"ended by {name}{' (it crashed)' if crash else ''}"


def tail(text: str, lines: int = _TAIL_LINES) -> str:
    """Return the last lines that say something."""
    kept = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(kept[-lines:])


def death_with_parent() -> Callable[[], None] | None:
    """Return what asks the kernel to end the calling process when its parent ends; Linux alone.

    Without it, `kill -9` leaves the child running: a stage that the next `dvc repro` races with, a
    builder that holds the GPU. libc is loaded here, so that a forked child need not.
    """
    if sys.platform != "linux":
        return None
    prctl, kill = ctypes.CDLL(None).prctl, int(signal.SIGKILL)

    def ask() -> None:
        prctl(1, kill)  # PR_SET_PDEATHSIG

    return ask
