"""What a worker is asked to do and what it says of it, in files that both sides read.

The worker may run on another node, so that a folder that both see is all that they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from diffusion_engines.errors import IntegrityError
from diffusion_engines.failures import Failure
from diffusion_engines.files import read_json, write_json

_FORMAT = 1

Purpose = Literal["build", "measure", "checkout", "report", "push"]


@dataclass(frozen=True)
class Desk:
    """A worker's folder.

    Attributes:
        folder: named as the target.
    """

    folder: Path

    @property
    def clone(self) -> Path:
        """Of the repository, in which the worker runs DVC."""
        return self.folder / "clone"

    @property
    def task(self) -> Path:
        """What is to be done."""
        return self.folder / "task.json"

    @property
    def record(self) -> Path:
        """What came of it; there once the worker has ended by itself."""
        return self.folder / "record.json"

    @property
    def log(self) -> Path:
        """The output of DVC and its stages."""
        return self.folder / "log.txt"

    @property
    def beat(self) -> Path:
        """Changes every few seconds while the worker lives."""
        return self.folder / "beat"

    @property
    def failures(self) -> Path:
        """What stages failed of."""
        return self.folder / "failures"


@dataclass(frozen=True)
class Step:
    """A command of DVC.

    Attributes:
        purpose: of it.
        words: its arguments.
    """

    purpose: Purpose
    words: Sequence[str]


@dataclass(frozen=True)
class Task:
    """Steps to be done one after the other, up to the first that fails.

    Attributes:
        folder: of the repository to work in.
        steps: of the work.
        quiet: a file whose lock the step `measure` has alone and all others share, so that nothing
            is built beside a timing; None where no other worker is on the machine.
    """

    folder: str
    steps: Sequence[Step]
    quiet: str | None = None


@dataclass(frozen=True)
class Record:
    """What came of a task.

    Attributes:
        host: where it ran.
        seconds: that it took.
        failed: the purpose of the step that failed; None where all ended well.
        problem: what that step ended with, in a line.
        failures: what stages failed of.
    """

    host: str
    seconds: float
    failed: Purpose | None = None
    problem: str = ""
    failures: Sequence[Failure] = ()


def write_task(desk: Desk, task: Task) -> None:
    """Leave a task for the worker."""
    write_json(desk.task, {"format": _FORMAT, **asdict(task)})


def read_task(desk: Desk) -> Task:
    """Return what is to be done.

    Raises:
        IntegrityError: the file cannot be read, or is of another format.
    """
    content = _read(desk.task)
    return Task(**content | {"steps": [Step(**step) for step in content["steps"]]})


def write_record(desk: Desk, record: Record) -> None:
    """Say what came of the task."""
    write_json(desk.record, {"format": _FORMAT, **asdict(record)})


def read_record(desk: Desk) -> Record | None:
    """Return what came of the task; None while the worker has not said it.

    Raises:
        IntegrityError: the file cannot be read, or is of another format.
    """
    if not desk.record.is_file():
        return None
    content = _read(desk.record)
    return Record(**content | {"failures": [Failure(**one) for one in content["failures"]]})


def _read(path: Path) -> dict[str, Any]:
    content = dict(read_json(path))
    if (found := content.pop("format", None)) != _FORMAT:
        raise IntegrityError(
            f"{path} is of another release of this project",
            expected=f"format {_FORMAT}",
            found=f"format {found}",
            fix="let all nodes run this checkout's code, and run `make fleet` again",
        )
    return content
