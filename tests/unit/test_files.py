"""Folders are whole or absent, and a manifest notices damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusion_engines.errors import IntegrityError
from diffusion_engines.files import (
    copy_files,
    new_folder,
    read_manifest,
    write_json,
    write_manifest,
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


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda p: p.write_bytes(b"0123456x89"), "is damaged"),
        (lambda p: p.write_bytes(b"01234"), "wrong size"),
        (lambda p: p.unlink(), "is missing"),
    ],
)
def test_damage_is_noticed(tmp_path: Path, damage, expected: str) -> None:
    (tmp_path / "weights").write_bytes(b"0123456789")
    write_manifest(tmp_path, "onnx", {"name": "unet"})
    assert read_manifest(tmp_path, "onnx")["name"] == "unet"
    damage(tmp_path / "weights")
    with pytest.raises(IntegrityError, match=expected) as raised:
        read_manifest(tmp_path, "onnx")
    assert "dvc repro" in str(raised.value)


def test_another_kind_of_folder_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, "onnx", {})
    with pytest.raises(IntegrityError, match="something else"):
        read_manifest(tmp_path, "engine")


def test_a_missing_or_broken_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="does not exist"):
        read_manifest(tmp_path, "onnx")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(IntegrityError, match="not valid JSON"):
        read_manifest(tmp_path, "onnx")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"kind": "on\xff"}', "not valid JSON"),  # a flipped byte need not be text
        (b"[]", "is no manifest"),
        (b'{"kind": "onnx"}', "is no manifest"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(IntegrityError, match=expected) as raised:
        read_manifest(tmp_path, "onnx")
    assert "dvc repro" in str(raised.value)


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
    write_manifest(source, "engine", {})
    copy_files(source, tmp_path / "copy")
    assert (tmp_path / "copy/deep/data").read_bytes() == (source / "deep/data").read_bytes()
    assert not (tmp_path / "copy/manifest.json").exists()


def test_a_folder_of_one_s_own_gets_nothing_else(tmp_path: Path) -> None:
    with new_folder(tmp_path / "pictures" / "leaf") as folder:
        (folder / "x").write_text("x")
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["leaf"]
