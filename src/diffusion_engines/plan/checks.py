"""What the stages that run every time, or write a constant, would write: asked without writing it.

The probes' own functions are called in this process; what they find is compared, and thrown away.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_engines.backends import backend
from diffusion_engines.backends.base import Target
from diffusion_engines.backends.probe import find_fingerprints
from diffusion_engines.checks import CHECKED
from diffusion_engines.errors import HardwareError
from diffusion_engines.files import text_from_json
from diffusion_engines.layout import Workspace
from diffusion_engines.machines import is_kept
from diffusion_engines.plan.contents import hash_of_bytes

# The content of a record that does not exist yet: it will have the time at which it is written.
NEW = "new"


@dataclass(frozen=True)
class Writes:
    """What a check would leave behind.

    Attributes:
        values: the JSON of its outputs by path; None for one that stays as it is, :data:`NEW` for
            one that will be unlike all before it.
    """

    values: Mapping[str, Any]


def hash_of_json(value: Any) -> str:
    """Return DVC's hash of a file that this project writes with such content."""
    if value == NEW:
        return NEW
    return hash_of_bytes(text_from_json(value).encode())


def written_by(
    stage: str, root: Path, targets: Mapping[str, Target], asked: Collection[str]
) -> Writes | None:
    """Return what a check would write; None for a stage that is none.

    Args:
        stage: as DVC calls it, such as ``probe@cpu``.
        root: of the repository.
        targets: all of them.
        asked: targets to be timed anew.

    Raises:
        HardwareError: it would fail on this machine.
    """
    name, _, target = stage.partition("@")
    workspace = Workspace(root)
    if name == "check_conf":
        return Writes({_relative(workspace.checked_conf, root): CHECKED})
    if name == "probe":
        paths = workspace.fingerprint(target), workspace.wrap_fingerprint(target)
        found = find_fingerprints(target, targets[target], *paths)
        return Writes(
            {
                _relative(path, root): found[index] if found else None
                for index, path in enumerate(paths)
            }
        )
    if name == "probe_machine":
        record = workspace.machine(target)
        kept = is_kept(
            target,
            record,
            lambda: backend(targets[target].backend).check_hardware(targets[target]),
            asked=target in asked,
        )
        return Writes({_relative(record, root): None if kept else NEW})
    return None


def cannot_build(target: Target) -> HardwareError | None:
    """Return why this machine builds nothing for a target; None where it does."""
    try:
        backend(target.backend).fingerprint(target)
    except HardwareError as error:
        return error
    return None


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()
