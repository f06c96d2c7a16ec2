"""A release as an OCI layout: every file is there again, and nothing that is another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from diffusion_engines.cli import main
from diffusion_engines.errors import IntegrityError
from diffusion_engines.files import sha256_of_file
from diffusion_engines.layout import Workspace
from diffusion_engines.release.oci import read_layout, write_layout
from diffusion_engines.release.publishing import publish
from tests.unit.release.conftest import files_of, measure


@pytest.fixture
def layout(workspace: Workspace, tmp_path: Path) -> Path:
    """Of a release of two targets with equal engines."""
    shutil.copytree(workspace.bundles("cpu"), workspace.bundles("same"))
    measure(workspace, "same")
    publish(workspace, ["cpu", "same"], tmp_path / "release")
    write_layout(tmp_path / "release", tmp_path / "layout")
    return tmp_path / "layout"


def rewrite(layout: Path, change: Callable[[dict], object]) -> None:
    """Change the manifest as somebody would who makes all digests fit."""
    index = json.loads((layout / "index.json").read_text())
    blobs = layout / "blobs/sha256"
    old = blobs / index["manifests"][0]["digest"].removeprefix("sha256:")
    manifest = json.loads(old.read_text())
    change(manifest)
    old.write_text(json.dumps(manifest))
    digest = sha256_of_file(old)
    old.rename(blobs / digest)
    index["manifests"][0]["digest"] = f"sha256:{digest}"
    (layout / "index.json").write_text(json.dumps(index))


def test_a_layout_gives_the_release_back(
    layout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release = files_of(tmp_path / "release")
    main(["export-oci", str(tmp_path / "release"), str(tmp_path / "again"), "--tag", "v1"])
    main(["import-oci", str(tmp_path / "again"), str(tmp_path / "back"), "--tag", "v1"])
    assert files_of(tmp_path / "back") == release
    # The same release has the same digest; equal files are stored once.
    digest = write_layout(tmp_path / "release", tmp_path / "third")
    assert capsys.readouterr().out.count(digest) == 2
    assert digest == json.loads((layout / "index.json").read_text())["manifests"][0]["digest"]
    stored = len(list((layout / "blobs/sha256").iterdir()))
    assert stored == len(set(release.values())) + 2  # the manifest and the empty config


def alter_a_blob(layout: Path) -> None:
    blob = max((layout / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")


def lose_a_blob(layout: Path) -> None:
    max((layout / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size).unlink()


def lead_out(layout: Path) -> None:
    title = "org.opencontainers.image.title"
    rewrite(layout, lambda manifest: manifest["layers"][0]["annotations"].update({title: "../x"}))


def leave_out(layout: Path) -> None:
    title = "org.opencontainers.image.title"
    rewrite(
        layout,
        lambda manifest: manifest.update(
            layers=[x for x in manifest["layers"] if "receipt" not in x["annotations"][title]]
        ),
    )


def be_an_image(layout: Path) -> None:
    rewrite(layout, lambda manifest: manifest.pop("artifactType"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (alter_a_blob, "is not the blob of its name"),
        (lose_a_blob, "no such file"),
        (lead_out, "names a file outside of the release"),
        (leave_out, "receipt.json is not what release.json says of it"),
        (be_an_image, "holds something else"),
    ],
)
def test_what_was_altered_is_refused(
    layout: Path, tmp_path: Path, change: Callable[[Path], None], problem: str
) -> None:
    change(layout)
    with pytest.raises(IntegrityError, match=problem):
        read_layout(layout, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_tag_that_is_not_there_is_said(layout: Path, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="has 0 artifacts of the tag v9"):
        read_layout(layout, tmp_path / "back", "v9")
