"""Clones of this repository in which DVC runs for real, on a fleet of one component."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from tests.shared import shared_folder

ROOT = Path(__file__).parents[2]

# One component, so that the whole DAG takes about a minute.
FLEET = """\
# @package _global_
# The UNet for two targets; for tests.
defaults:
  - /target@targets.cpu: cpu
  - /target@targets.rtx: rtx40
  - /precision@fleet.cpu: fp32
  - /precision@fleet.rtx: fp16
fleet:
  cpu: {only: [unet]}
  rtx: {only: [unet]}
measure: [cpu]
"""
# What a run recorded here is not theirs.
LEFT_OUT = ("artifacts/fingerprints/", "artifacts/machines/", "dvc.lock", "tests/")
# Few and short runs: these tests look at what runs, not at how fast.
CHOICES = {
    "model: lemon": "model: tiny",
    "fleet: default": "fleet: small",
}
SHORT = {
    "conf/reference/default.yaml": {"steps: 20": "steps: 2", "frames: 11": "frames: 2"},
    "conf/benchmark/default.yaml": {
        "steps: 20": "steps: 2",
        "warmup: 2": "warmup: 0",
        "repeats: 10": "repeats: 1",
    },
    # Random weights lose more in 8 bits than the default model's.
    "conf/quantize/default.yaml": {
        "rel_l2: 1.3e-1": "rel_l2: 5.0e-1",
        "rel_l2: 1.6e-1": "rel_l2: 5.0e-1",
    },
    "conf/generate/default.yaml": {"steps: 20": "steps: 2", "frames: 11": "frames: 2"},
    "conf/config.yaml": CHOICES,
}


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit status, output, and the stages that DVC ran or restored."""

    status: int
    output: str

    @property
    def ran(self) -> set[str]:
        return set(re.findall(r"Running stage '([^']+)'", self.output))

    @property
    def built(self) -> set[str]:
        """The stages that ran, but for the probes, which always run."""
        return {name for name in self.ran if not name.startswith("probe")}

    @property
    def restored(self) -> set[str]:
        return set(re.findall(r"Stage '([^']+)' is cached - skipping run", self.output))


@dataclass(frozen=True)
class Clone:
    """A working copy with commands that run in it."""

    path: Path

    def run(self, *command: str, check: bool = True, env: dict[str, str] | None = None) -> Outcome:
        done = subprocess.run(
            command,
            cwd=self.path,
            env=environment() | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=900,
        )
        if check and done.returncode:
            raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout}")
        return Outcome(done.returncode, done.stdout)

    def repro(self, *arguments: str, check: bool = True, **kwargs: dict[str, str]) -> Outcome:
        return self.run("dvc", "repro", *arguments, check=check, **kwargs)

    def compose(self, *overrides: str) -> None:
        self.run("diffusion-engines", "compose", *overrides)

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.path / file
        text = path.read_text()
        assert old in text, f"{file} has no {old!r}"
        path.write_text(text.replace(old, new))

    def add_target(self, name: str, target: str, precision: str, *, measured: bool = False) -> None:
        """Add a target to the fleet, for the UNet alone, and compose."""
        fleet = "conf/fleet/small.yaml"
        added = f"  - /target@targets.{name}: {target}\n  - /precision@fleet.{name}: {precision}\n"
        self.edit(fleet, "fleet:\n", f"{added}fleet:\n  {name}: {{only: [unet]}}\n")
        if measured:
            self.edit(fleet, "measure: [", f"measure: [{name}, ")
        self.compose()

    def commit(self, message: str = "state") -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", message)

    def copy(self, path: Path) -> Clone:
        shutil.copytree(self.path, path, symlinks=True)
        return Clone(path)


def environment() -> dict[str, str]:
    """The environment of a user who has activated the virtual environment."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "PYTEST_", "HYDRA_"))}
    return kept | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        # The clone's library, so that a test that edits it edits what runs.
        "PYTHONPATH": "src",
        "GIT_AUTHOR_NAME": "test",
        "GIT_AUTHOR_EMAIL": "test@example.invalid",
        "GIT_COMMITTER_NAME": "test",
        "GIT_COMMITTER_EMAIL": "test@example.invalid",
        "HF_HUB_OFFLINE": "1",
    }


def make_clone(path: Path) -> Clone:
    """Copy what git tracks, or would track, into a repository of its own."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (
            name.startswith(("artifacts/fingerprints/", "artifacts/machines/", "tests/"))
            or name == "dvc.lock"
        ):
            continue
        if (ROOT / name).is_file():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, path / name)
    clone = Clone(path)
    clone.run("git", "init", "-q", "-b", "main")
    (path / "conf/fleet/small.yaml").write_text(FLEET)
    for file, edits in SHORT.items():
        for old, new in edits.items():
            clone.edit(file, old, new)
    clone.compose()
    clone.commit("clone")
    return clone


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and those that need no finished clone before the others.

    So pytest-xdist's workers end at about the same time, and the second one has something to do
    while the first one makes the finished clone.
    """
    waiting = {item.path for item in items if "finished" in getattr(item, "fixturenames", ())}

    def place(item: pytest.Item) -> int:
        if item.get_closest_marker("pipeline") is None:
            return 2
        return 1 if item.path in waiting else 0

    items.sort(key=place)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone in which everything is built; do not change it, take :func:`clone`.

    pytest-xdist's workers share it: the first one that gets here builds it.
    """
    folder = shared_folder(tmp_path_factory)
    path = folder / "finished"
    with FileLock(folder / "finished.lock"):
        if not path.exists():
            clone = make_clone(folder / "unfinished")
            outcome = clone.repro()
            assert "report" in outcome.built
            clone.commit("built")
            # DVC keeps no absolute path but of its own temporary files.
            clone.path.rename(path)
    return Clone(path)


@pytest.fixture
def clone(finished: Clone, tmp_path: Path) -> Clone:
    """A copy of the finished clone, cache included, to change."""
    return finished.copy(tmp_path / "clone")


@pytest.fixture
def fresh(tmp_path: Path) -> Clone:
    """A clone in which nothing has run."""
    return make_clone(tmp_path / "fresh")
