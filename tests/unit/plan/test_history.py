"""What a folder held when DVC hashed it is found in git."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from diffusion_engines.plan.contents import hash_of_bytes, hash_of_listing
from diffusion_engines.plan.history import committed, listing_of

# DVC's own hash of the folder below, by `dvc add`.
FOLDER = "6b1e1483494767eb21209a4fc650712a.dir"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    for number in range(3):
        (tmp_path / "code/below").mkdir(parents=True, exist_ok=True)
        (tmp_path / "code/a b.py").write_text(f"{number}\n")
        (tmp_path / "code/below/ü.py").write_text("no line's end")
        (tmp_path / "other").write_text(f"{number}")
        git(tmp_path, "add", "-A")
        git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", str(number))
    return tmp_path


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=root, check=True)


def test_a_folder_is_found_in_the_commit_that_had_its_hash(repository: Path) -> None:
    found = committed(repository, "code", FOLDER)
    assert found == {"a b.py": b"1\n", "below/ü.py": b"no line's end"}
    assert hash_of_listing(listing_of(found)) == FOLDER


def test_a_file_is_found_by_its_own(repository: Path) -> None:
    found = committed(repository, "code/a b.py", hash_of_bytes(b"0\n"))
    assert found == {"": b"0\n"}


def test_what_was_never_committed_is_not_found(repository: Path, tmp_path: Path) -> None:
    assert committed(repository, "code", hash_of_bytes(b"never")) is None
    (nowhere := tmp_path / "nowhere").mkdir()
    assert committed(nowhere, "code", FOLDER) is None
