"""Record fingerprints, and say what to do on a machine that cannot build for a target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from diffusion_engines.backends import backend
from diffusion_engines.backends.base import Target
from diffusion_engines.errors import HardwareError
from diffusion_engines.files import read_json, write_json


def probe_target(name: str, target: Target, build: Path, wrap: Path) -> None:
    """Write a target's fingerprints, or keep the recorded ones where this machine has none.

    Args:
        name: of the target.
        target: its settings.
        build: gets what building depends on.
        wrap: gets what wrapping depends on beyond the engine.

    Raises:
        HardwareError: as :func:`find_fingerprints`.
    """
    found = find_fingerprints(name, target, build, wrap)
    if found is None:
        print(f"  {name} cannot be built here; the recorded fingerprint stays: {build}")
        return
    for path, value in zip((build, wrap), found, strict=True):
        write_json(path, value)


def find_fingerprints(
    name: str, target: Target, build: Path, wrap: Path
) -> tuple[Mapping[str, object], Mapping[str, object]] | None:
    """Return what building and wrapping for a target depend on; None where the records stay.

    Args:
        name: of the target.
        target: its settings.
        build: has the record of what building depends on, if there is one.
        wrap: has that of wrapping.

    Raises:
        HardwareError: this machine cannot build for the target and no fingerprint is recorded;
            says how to get its engines.
    """
    module = backend(target.backend)
    try:
        return module.fingerprint(target), module.wrap_fingerprint(target)
    except HardwareError as error:
        if build.is_file() and wrap.is_file():
            for path in (build, wrap):
                read_json(path)  # a broken record is no record
            return None
        raise HardwareError(
            f"this machine cannot build for the target {name}, and has no record of one that "
            f"could\n  because:  {error.problem}",
            expected=error.expected,
            found=error.found,
            fix=f"{error.fix}\n"
            "`make repro` goes on with the targets that can be built here, and names the others.\n"
            f"To take {name} from a cache: get {build}, {wrap.name} and dvc.lock from git,\n"
            "where the machine that built it committed them, then `dvc pull` from the shared\n"
            "remote.",
        ) from error
