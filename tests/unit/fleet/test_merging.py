"""What workers recorded is merged stage by stage; what two recorded differently is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from diffusion_engines.fleet.merging import merge_clone, read_stages

A, B, C = {"cmd": "a"}, {"cmd": "b"}, {"cmd": "c"}


def lock(root: Path, stages: dict[str, Any]) -> None:
    root.mkdir(exist_ok=True)
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))


def fingerprint(root: Path, name: str, value: str) -> None:
    path = root / "artifacts/fingerprints" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def test_two_workers(tmp_path: Path) -> None:
    root, one, two = tmp_path / "root", tmp_path / "one", tmp_path / "two"
    base = {"export": A, "build@one-unet": A}
    for folder in (root, one, two):
        lock(folder, base)
        fingerprint(folder, "one", "old")
        fingerprint(folder, "two", "old")
    lock(one, {"export": A, "build@one-unet": B})
    fingerprint(one, "one", "new")
    fingerprint(one, "two", "not the worker's")
    lock(two, {"export": A, "build@one-unet": A, "build@two-unet": C})

    assert merge_clone(root, base, one, "one") == (["build@one-unet"], [])
    assert merge_clone(root, base, two, "two") == (["build@two-unet"], [])

    assert read_stages(root) == {"export": A, "build@one-unet": B, "build@two-unet": C}
    found = {p.stem: json.loads(p.read_text()) for p in root.rglob("artifacts/fingerprints/*")}
    assert found == {"one": "new", "two": "old"}


def test_one_stage_by_two_workers(tmp_path: Path) -> None:
    root, one, two = tmp_path / "root", tmp_path / "one", tmp_path / "two"
    base = {"export": A}
    lock(root, base)
    lock(one, {"export": B, "x": A})
    lock(two, {"export": C, "x": A})

    assert merge_clone(root, base, one, "one") == (["export", "x"], [])
    # Equal ones are no conflict.
    assert merge_clone(root, base, two, "two") == (["x"], ["export"])
    assert read_stages(root) == {"x": A}


def test_a_worker_that_recorded_nothing_changes_nothing(tmp_path: Path) -> None:
    root, one = tmp_path / "root", tmp_path / "one"
    lock(root, {"export": A})
    before = (root / "dvc.lock").read_bytes()
    one.mkdir()

    assert merge_clone(root, read_stages(root), one, "one") == ([], [])
    assert (root / "dvc.lock").read_bytes() == before
