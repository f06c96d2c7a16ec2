"""The exceptions of this project: each says what was expected, what was found, and what to do.

Stages end with exit status 1 and the text of one of these, never with a traceback, when the cause
is something that a person can mend.
"""

from __future__ import annotations


class DiffusionEnginesError(Exception):
    """A failure with a known remedy.

    Args:
        problem: what failed, naming the file or the config key.
        expected: what should have been there.
        found: what was there.
        fix: what to do about it, as a command wherever there is one.
    """

    def __init__(self, problem: str, *, expected: str = "", found: str = "", fix: str = "") -> None:
        self.problem, self.expected, self.found, self.fix = problem, expected, found, fix
        lines = [problem]
        for label, text in (("expected", expected), ("found", found), ("fix", fix)):
            if text:
                indented = text.strip("\n").replace("\n", "\n            ")
                lines.append(f"  {label + ':':<10}{indented}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        """Return how another process makes it: the arguments are keywords."""
        return _remade, (type(self), self.problem, self.expected, self.found, self.fix)

    @property
    def in_a_line(self) -> str:
        """Return what failed, without the remedy, for a table or a log."""
        parts = [self.problem]
        if self.expected and self.found:
            parts.append(f"expected {self.expected}, found {self.found}")
        return ": ".join(" ".join(part.split()) for part in parts)


def _remade(
    kind: type[DiffusionEnginesError], problem: str, expected: str, found: str, fix: str
) -> DiffusionEnginesError:
    return kind(problem, expected=expected, found=found, fix=fix)


def first_line(error: BaseException) -> str:
    """Return the kind of a library's exception and the first line of what it says."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


class ConfigError(DiffusionEnginesError):
    """A key of params.yaml is unknown, missing, of the wrong type, or contradicts another."""


class WeightsError(DiffusionEnginesError):
    """The weights cannot be had, are incomplete, damaged, or not of the architecture asked for."""


class ExportError(DiffusionEnginesError):
    """A component could not be written as the ONNX graph that was asked for."""


class HardwareError(DiffusionEnginesError):
    """This machine, or a library on it, cannot build or run what was asked for."""


class BusyError(DiffusionEnginesError):
    """Another run works in this folder."""


class BuildError(DiffusionEnginesError):
    """A backend refused a graph or built something else than what was asked for."""


class IntegrityError(DiffusionEnginesError):
    """A file is not, byte for byte, the one that its manifest describes."""


class FingerprintError(DiffusionEnginesError):
    """An engine was built for another machine, or another library version, than this one."""


class ShapeError(DiffusionEnginesError):
    """An engine was called with a size, or with a kind of value, that it was not built for."""


class GateError(DiffusionEnginesError):
    """An engine's output differs from the reference by more than its tolerance."""


class OutOfTimeError(DiffusionEnginesError):
    """The time that a search was given is up; it goes on where it stopped when it is run again."""


class RemoteError(DiffusionEnginesError):
    """A DVC remote does not answer, refuses, or is full; what is local is as it was."""
