"""A clone whose engines are validated and timed, so that they can be published."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from diffusion_engines.families.stable_diffusion import FAMILY
from diffusion_engines.files import sha256_of_file, write_json
from diffusion_engines.layout import Workspace
from diffusion_engines.machines import this_machine
from tests.reports import NOT_SCORED, PYTORCH, write_latencies, write_parity

COMPONENTS = dict.fromkeys(FAMILY.components, "fp32")
HERE = this_machine()


@pytest.fixture
def workspace(tiny_bundles: Path, tmp_path: Path) -> Workspace:
    """A clone with the engines of the target cpu, validated, and timed on this machine."""
    made = Workspace(tmp_path / "clone")
    shutil.copytree(tiny_bundles, made.bundles("cpu"))
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]  # a machine for tests may know of nobody
    for command in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *command], cwd=made.root, check=True)
    measure(made, "cpu")
    return made


def files_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file by its path."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of_file(path) for path in paths}


def measure(workspace: Workspace, target: str, *, gpus: tuple[str, ...] = ()) -> None:
    write_parity(workspace, target, COMPONENTS, 1e-6, NOT_SCORED)
    write_latencies(workspace, target, COMPONENTS, [*gpus], {"fp32": PYTORCH})
    as_of(workspace, target, HERE | {"gpus": [*gpus]})


def as_of(workspace: Workspace, target: str, machine: Mapping[str, Any]) -> None:
    path = workspace.benchmark(target) / "benchmark.json"
    write_json(path, json.loads(path.read_text()) | {"machine": dict(machine)})
