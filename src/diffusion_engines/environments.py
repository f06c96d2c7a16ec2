"""What a stage ran with: the code's commit, Python, the system, and every library that it loaded.

It lies in the stage's log and not in the folder that the stage makes: equal builds stay equal, and
a commit that changes nothing of an engine leaves its bytes alone. DVC restores both together, so
that the log says of the bytes that are there what made them, on whatever machine.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from diffusion_engines.results import write_result

ENVIRONMENT = "environment.json"
_VERSION = 1
_OWN = "diffusion-engines"
# What a run itself writes, of what git tracks.
_WRITTEN_BY_RUNS = ("dvc.lock", "params.yaml", "artifacts")


@dataclass(frozen=True)
class Environment:
    """What a stage ran with.

    Attributes:
        commit: of this repository; None: it is no clone of git's.
        clean: whether the code was that commit's.
        python: its version.
        system: the operating system and the processor's family.
        libraries: versions of the distributions that it had loaded, by name.
    """

    commit: str | None
    clean: bool
    python: str
    system: str
    libraries: Mapping[str, str]


@dataclass(frozen=True)
class Other:
    """What is of another version than it was; None: it is not installed."""

    name: str
    expected: str
    found: str | None

    def __str__(self) -> str:
        """One line for a person."""
        return f"{self.name} {self.expected}, found {self.found or 'none'}"


def environment_here(root: Path) -> Environment:
    """Return what this process runs with; libraries are those that it has loaded by now."""
    loaded = {name.partition(".")[0] for name in sys.modules}
    of_modules = metadata.packages_distributions()
    names = {name for module in loaded for name in of_modules.get(module, [])} - {_OWN}
    versions = {name: _installed(name) for name in sorted(names)}
    commit, clean = commit_of(root)
    return Environment(
        commit=commit,
        clean=clean,
        python=platform.python_version(),
        system=_system(),
        libraries={name: version for name, version in versions.items() if version},
    )


def commit_of(root: Path) -> tuple[str | None, bool]:
    """Return the commit of a working copy, and whether its code is the commit's.

    What runs write there, such as dvc.lock, does not count.
    """
    head = _git(root, "rev-parse", "HEAD")
    others = [f":(exclude){name}" for name in _WRITTEN_BY_RUNS]
    edited = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *others)
    return head or None, head is not None and edited == ""


def others_here(recorded: Iterable[Environment]) -> list[Other]:
    """Return what is of another version on this machine than in any of some environments."""
    found: dict[str, Other] = {}
    for environment in recorded:
        expected = {
            "Python": environment.python,
            "system": environment.system,
            **environment.libraries,
        }
        for name, version in expected.items():
            if (here := _version_here(name)) != version:
                found.setdefault(name, Other(name, version, here))
    return list(found.values())


def write_environment(folder: Path, environment: Environment) -> None:
    """Write it into the folder of a stage's log."""
    write_result(folder / ENVIRONMENT, environment, version=_VERSION)


def environment_from_json(text: str) -> Environment | None:
    """Return what :func:`write_environment` wrote; None where another version of this did."""
    value = json.loads(text)
    if value.pop("format", None) != _VERSION:
        return None
    return Environment(**value)


def _version_here(name: str) -> str | None:
    if name == "Python":
        return platform.python_version()
    if name == "system":
        return _system()
    return _installed(name)


def _installed(name: str) -> str | None:
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    # setuptools puts copies of its own on Python's path, once it is imported.
    return None if "_vendor" in Path(str(found.locate_file(""))).parts else found.version


def _system() -> str:
    libc = " ".join(filter(None, platform.libc_ver()))
    return " ".join(filter(None, (platform.system(), platform.machine(), libc)))


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # an image without git
        return None
    return done.stdout.strip() if done.returncode == 0 else None
