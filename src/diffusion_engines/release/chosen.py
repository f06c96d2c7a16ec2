"""Which engines are loaded on hardware that has several: the type, written and read here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusion_engines.release.profiles import Profile
from diffusion_engines.results import read_result, write_result

CHOSEN = "chosen.json"
# Raise it when a field changes.
_VERSION = 1


@dataclass(frozen=True)
class Pick:
    """Whose engine of a component is loaded.

    Attributes:
        target: whose.
        milliseconds: of each alternative that has such an engine, and of the target itself in the
            same run: its median, then the other's. Encoders are timed together.
        reason: why this one, in words.
    """

    target: str
    milliseconds: Mapping[str, tuple[float, float]]
    reason: str


@dataclass(frozen=True)
class Chosen:
    """The engines for the hardware of a target.

    Attributes:
        target: to which the others are alternatives.
        profiles: of the target and of the alternatives that passed; in no release.
        passed_over: why each other alternative is not taken.
        components: the picks.
    """

    target: str
    profiles: tuple[Profile, ...]
    passed_over: Mapping[str, str]
    components: Mapping[str, Pick]


def write_chosen(chosen: Chosen, folder: Path) -> None:
    """Write ``chosen.json`` into ``folder``."""
    write_result(folder / CHOSEN, chosen, version=_VERSION)


def read_chosen(folder: Path) -> Chosen:
    """Read what :func:`write_chosen` wrote.

    Raises:
        IntegrityError: it is missing, damaged, or of another format.
    """
    return read_result(folder / CHOSEN, Chosen, version=_VERSION, stage=f"choose@{folder.name}")
