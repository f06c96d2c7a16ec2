"""What stages failed of in one run: written by each stage, read by ``make repro`` at the end."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from diffusion_engines.errors import DiffusionEnginesError
from diffusion_engines.files import read_json, write_json

_MESSAGE_LENGTH = 300


@dataclass(frozen=True)
class Failure:
    """A stage that did not end well.

    Attributes:
        stage: as DVC calls it, e.g. ``build@h100-unet``.
        target: that it worked for, if it is of one.
        kind: the exception's class; empty if it gave none, as when it was killed.
        problem: what failed.
        expected: what should have been there.
        found: what was there.
        fix: what to do about it.
    """

    stage: str
    target: str | None = None
    kind: str = ""
    problem: str = "it ended without a word: it crashed, or was killed (out of memory?)"
    expected: str = ""
    found: str = ""
    fix: str = ""

    @property
    def waits_for_hardware(self) -> bool:
        """Whether another machine could do it."""
        return self.kind == "HardwareError" and self.target is not None and bool(self.expected)

    @property
    def text(self) -> str:
        """What its exception says."""
        return str(
            DiffusionEnginesError(
                self.problem, expected=self.expected, found=self.found, fix=self.fix
            )
        )


def failure_from_exception(blank: Failure, error: BaseException) -> Failure:
    """Say in ``blank`` what happened: by the parts of an error of this project, or by a message."""
    kind = type(error).__name__
    if isinstance(error, DiffusionEnginesError):
        return replace(
            blank,
            kind=kind,
            problem=error.problem,
            expected=error.expected,
            found=error.found,
            fix=error.fix,
        )
    message = " ".join(str(error).split())[:_MESSAGE_LENGTH]
    return replace(blank, kind=kind, problem=f"{kind}: {message} (its traceback stands above)")


def write_failure(folder: Path, failure: Failure) -> None:
    """Keep a failure; one of the same stage is replaced."""
    write_json(_path(folder, failure), asdict(failure))


def read_failures(folder: Path) -> list[Failure]:
    """Return the failures in a folder, in the order in which they were written."""
    paths = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return [Failure(**read_json(path)) for path in paths]


def remove_failure(folder: Path, failure: Failure) -> None:
    """Take back what was written of a stage that ended well after all."""
    _path(folder, failure).unlink()


def _path(folder: Path, failure: Failure) -> Path:
    return folder / f"{failure.stage}.json"
