"""Files and folders are whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusion_engines.files import (
    copy_files,
    new_folder,
    write_json,
)


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "artifacts" / "exports" / "unet"
    with new_folder(target) as folder:
        (folder / "a").write_text("new")
        assert not target.exists()
        assert "exports" not in folder.relative_to(tmp_path).parts[:2]
    assert (target / "a").read_text() == "new"
    assert not any((tmp_path / "artifacts" / ".tmp").iterdir())


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "artifacts" / "exports" / "unet"
    target.mkdir(parents=True)
    (target / "a").write_text("old")

    def fail() -> None:
        with new_folder(target) as folder:
            (folder / "a").write_text("new")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert (target / "a").read_text() == "old"
    assert not any((tmp_path / "artifacts" / ".tmp").iterdir())


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    target = tmp_path / "artifacts" / "exports" / "unet"
    with new_folder(target) as folder:
        scratch = folder
    scratch.mkdir(parents=True)
    (scratch / "half").write_text("of a killed run")
    with new_folder(target) as folder:
        assert list(folder.iterdir()) == []


def test_json_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a", {"x": object()})
    (tmp_path / ".a.partial").symlink_to("/dev/full")  # a real ENOSPC
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "a", {"x": 2})
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == '{\n  "x": 1\n}\n'


def test_equal_content_has_equal_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"x": 1, "y": 2})
    write_json(tmp_path / "b", {"y": 2, "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_copies_are_equal_and_leave_the_manifest(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "data").write_bytes(bytes(range(256)) * 5000)
    (source / "manifest.json").write_text("{}")
    copy_files(source, tmp_path / "copy")
    assert (tmp_path / "copy/deep/data").read_bytes() == (source / "deep/data").read_bytes()
    assert not (tmp_path / "copy/manifest.json").exists()


def test_a_folder_of_one_s_own_gets_nothing_else(tmp_path: Path) -> None:
    with new_folder(tmp_path / "pictures" / "leaf") as folder:
        (folder / "x").write_text("x")
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["leaf"]
