"""A release as an OCI artifact in an image layout on disk, to push to any container registry.

A file of the release is a layer, titled with its path as ORAS has it, so that ``oras pull`` puts
every file in its place; a file that two profiles share is stored once. The same release gives the
same digest. oras-py copies layouts to registries and back, and makes none of files.

Layout: https://github.com/opencontainers/image-spec/blob/v1.1.1/image-layout.md
Artifacts: https://github.com/opencontainers/image-spec/blob/v1.1.1/manifest.md#guidelines-for-artifact-usage
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from diffusion_engines.errors import IntegrityError
from diffusion_engines.files import new_folder, read_json, sha256_of_file
from diffusion_engines.release.profiles import check_profile, read_release

ARTIFACT = "application/vnd.diffusion-engines.release.v1"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_INDEX = "application/vnd.oci.image.index.v1+json"
_EMPTY = "application/vnd.oci.empty.v1+json"
_LAYER = "application/octet-stream"
_TITLE = "org.opencontainers.image.title"
_TAG = "org.opencontainers.image.ref.name"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def write_layout(release: Path, folder: Path, tag: str = "latest") -> str:
    """Write a release as an OCI image layout.

    Args:
        release: its folder.
        folder: of the layout, which takes the place of an earlier one.
        tag: that the release gets in it.

    Returns:
        The digest of the artifact, such as ``sha256:…``, which is to be signed or pinned.

    Raises:
        IntegrityError: the release is missing or altered.
    """
    for profile in read_release(release).profiles:
        check_profile(profile, release)
    with new_folder(folder) as layout:
        blobs = layout / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        layers = []
        for path in sorted(path for path in release.rglob("*") if path.is_file()):
            digest = sha256_of_file(path)
            shutil.copyfile(path, blobs / digest)
            title = {_TITLE: path.relative_to(release).as_posix()}
            layers.append(_descriptor(_LAYER, digest, path.stat().st_size) | {"annotations": title})
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "artifactType": ARTIFACT,
            "config": _write_blob(blobs, _EMPTY, {}),
            "layers": layers,
        }
        artifact = _write_blob(blobs, _MANIFEST, manifest)
        index = {
            "schemaVersion": 2,
            "mediaType": _INDEX,
            "manifests": [artifact | {"artifactType": ARTIFACT, "annotations": {_TAG: tag}}],
        }
        (layout / "index.json").write_text(_compact(index))
        (layout / "oci-layout").write_text(_compact({"imageLayoutVersion": "1.0.0"}))
    return str(artifact["digest"])


def read_layout(folder: Path, release: Path, tag: str = "latest") -> str:
    """Write the release that a layout holds; every blob is compared with its digest.

    Args:
        folder: of the layout.
        release: takes the place of an earlier one.
        tag: of the release in the layout.

    Returns:
        The digest of the artifact.

    Raises:
        IntegrityError: the layout lacks the tag, is of something else, or a blob is missing or
            altered.
    """
    described = [
        one
        for one in read_json(folder / "index.json", _AGAIN)["manifests"]
        if one.get("annotations", {}).get(_TAG) == tag
    ]
    if len(described) != 1:
        raise IntegrityError(
            f"{folder} has {len(described)} artifacts of the tag {tag}",
            expected="one",
            fix=_AGAIN,
        )
    digest = str(described[0]["digest"])
    manifest = json.loads(_blob(folder, digest).read_bytes())
    if (kind := manifest.get("artifactType")) != ARTIFACT:
        raise IntegrityError(
            f"{folder} holds something else under the tag {tag}",
            expected=ARTIFACT,
            found=str(kind),
        )
    with new_folder(release) as made:
        for layer in manifest["layers"]:
            path = made / _safe(layer["annotations"][_TITLE], folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(_blob(folder, layer["digest"]), path)
        for profile in read_release(made).profiles:
            check_profile(profile, made)
    return digest


def _blob(folder: Path, digest: str) -> Path:
    """Return the file of a blob; raise IntegrityError where its bytes are others."""
    if not _DIGEST.fullmatch(digest):
        raise IntegrityError(f"{folder} names a blob that is none", found=digest, fix=_AGAIN)
    path = folder / "blobs" / "sha256" / digest.removeprefix("sha256:")
    found = f"sha256:{sha256_of_file(path)}" if path.is_file() else "no such file"
    if found != digest:
        raise IntegrityError(
            f"{path} is not the blob of its name", expected=digest, found=found, fix=_AGAIN
        )
    return path


def _safe(title: str, folder: Path) -> PurePosixPath:
    path = PurePosixPath(title)
    if path.is_absolute() or ".." in path.parts or "\\" in title or not path.parts:
        raise IntegrityError(
            f"{folder} names a file outside of the release", found=title, fix=_AGAIN
        )
    return path


def _write_blob(blobs: Path, kind: str, content: dict[str, Any]) -> dict[str, Any]:
    data = _compact(content).encode()
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return _descriptor(kind, digest, len(data))


def _descriptor(kind: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": size}


def _compact(content: dict[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":"), sort_keys=True)


_AGAIN = "pull it again; or `diffusion-engines export-oci` where the release is"
