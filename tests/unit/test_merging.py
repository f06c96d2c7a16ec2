"""dvc.lock is merged by its stages."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffusion_engines.errors import IntegrityError
from diffusion_engines.merging import merge_lock, merge_stages

A, B, C = {"cmd": "a"}, {"cmd": "b"}, {"cmd": "c"}
# As DVC writes small numbers, which YAML 1.1 takes for texts.
SMALL = "    params: {rel_l2: 1e-05}\n"


@pytest.mark.parametrize(
    ("base", "ours", "theirs", "expected"),
    [
        ({"x": A}, {"x": A}, {"x": A}, ({"x": A}, [])),
        ({"x": A}, {"x": B}, {"x": A}, ({"x": B}, [])),
        ({"x": A}, {"x": A}, {"x": B}, ({"x": B}, [])),
        ({"x": A}, {"x": B}, {"x": B}, ({"x": B}, [])),
        ({"x": A}, {"x": B}, {"x": C}, ({}, ["x"])),
        ({}, {"x": A}, {"y": B}, ({"x": A, "y": B}, [])),
        ({}, {"x": A}, {"x": B}, ({}, ["x"])),
        ({"x": A}, {}, {"x": A}, ({}, [])),
        ({"x": A}, {"x": A}, {}, ({}, [])),
        ({"x": A}, {}, {"x": B}, ({}, ["x"])),
    ],
)
def test_each_stage_is_taken_from_the_side_that_changed_it(
    base: dict[str, Any],
    ours: dict[str, Any],
    theirs: dict[str, Any],
    expected: tuple[dict[str, Any], list[str]],
) -> None:
    assert merge_stages(base, ours, theirs) == expected


def git(folder: Path, *arguments: str, check: bool = True) -> None:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=check, capture_output=True)


def write_lock(folder: Path, stages: dict[str, Any], message: str) -> None:
    text = yaml.safe_dump({"schema": "2.0", "stages": stages})
    (folder / "dvc.lock").write_text(f"{text}  simplify:\n    cmd: s\n{SMALL}")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", message)


def test_a_conflict_in_the_middle_of_a_merge_is_resolved_and_staged(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "-b", "main")
    write_lock(tmp_path, {"benchmark@a": A, "benchmark@b": A, "report": A}, "base")
    git(tmp_path, "checkout", "-qb", "other")
    write_lock(tmp_path, {"benchmark@a": A, "benchmark@b": B, "report": B}, "b measured")
    git(tmp_path, "checkout", "-q", "main")
    with pytest.raises(IntegrityError, match="not in conflict"):
        merge_lock(tmp_path)
    write_lock(tmp_path, {"benchmark@a": C, "benchmark@b": A, "report": C}, "a measured")
    git(tmp_path, "merge", "other", check=False)
    assert "<<<<<<<" in (tmp_path / "dvc.lock").read_text()

    assert merge_lock(tmp_path) == ["report"]

    text = (tmp_path / "dvc.lock").read_text()
    assert text.count("1e-05\n") == 1
    assert "'" not in text.split("stages:")[1]
    lock = yaml.safe_load(text)
    assert lock["stages"].pop("simplify") is not None
    assert lock == {"schema": "2.0", "stages": {"benchmark@a": C, "benchmark@b": B}}
    git(tmp_path, "commit", "-qm", "merged")  # nothing is in conflict any more
