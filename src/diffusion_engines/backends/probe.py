"""Record fingerprints, and say what to do on a machine that cannot build for a target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from diffusion_engines.backends import backend
from diffusion_engines.config import Target
from diffusion_engines.errors import HardwareError
from diffusion_engines.files import read_json, write_json


def probe_target(name: str, targets: Mapping[str, Target], path: Path) -> None:
    """Write the fingerprint of a target, or keep the recorded one where this machine has none.

    Raises:
        HardwareError: this machine cannot build for the target and no fingerprint is recorded;
            says which targets it can build, and how to get the others.
    """
    target = targets[name]
    try:
        write_json(path, backend(target.backend).fingerprint(target))
    except HardwareError as error:
        if path.is_file():
            read_json(path)  # a broken record is no record
            print(f"  {name} cannot be built here; the recorded fingerprint stays: {path}")
            return
        here = [other for other in sorted(targets) if _can_build(targets[other])]
        globs = " ".join(f"'build@{other}-*'" for other in here)
        raise HardwareError(
            f"this machine cannot build for the target {name}, and has no record of one that "
            f"could\n  because:  {error.problem}",
            expected=error.expected,
            found=error.found,
            fix=f"{error.fix}\n"
            f"Targets that can be built here: {', '.join(here) or 'none'}"
            + (f" (`dvc repro --glob {globs}`)" if here else "")
            + f".\nTo take {name} from a cache: get {path} and dvc.lock from git, where the\n"
            "machine that built it committed them, then `dvc pull` from the shared remote.",
        ) from error


def _can_build(target: Target) -> bool:
    try:
        backend(target.backend).fingerprint(target)
    except HardwareError:
        return False
    return True
