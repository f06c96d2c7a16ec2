"""What a release says of itself: its types, written and read here. No PyTorch in here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_engines.errors import IntegrityError
from diffusion_engines.files import MANIFEST, sha256_of_file
from diffusion_engines.results import read_result, write_result

RELEASE = "release.json"
RECEIPT = "receipt.json"
# Raise them when a field changes.
_VERSION = 1
_RECEIPT = 2


@dataclass(frozen=True)
class Timing:
    """How fast a profile's engines were, and where.

    Attributes:
        machine: as of :func:`diffusion_engines.machines.this_machine`.
        picture_ms, denoiser_ms: median of a whole picture and of one call, in milliseconds.
        images_per_second: of the timed batch.
        steps: of the timed runs.
    """

    machine: Mapping[str, Any]
    picture_ms: float
    denoiser_ms: float
    images_per_second: float
    steps: int


@dataclass(frozen=True)
class Profile:
    """The engines of one target, which lie in the release's folder of its name.

    Attributes:
        target: its name in the fleet.
        backend: what runs them.
        device: ``cpu`` or ``cuda``.
        precisions: by component.
        timing: None: they were not timed.
        bytes: of all its files; None: it is in no release.
        manifests: SHA-256 of each folder's manifest, which has that of every other file.
        receipt: SHA-256 of its receipt; None: it is in no release.
    """

    target: str
    backend: str
    device: str
    precisions: Mapping[str, str]
    timing: Timing | None
    bytes: int | None
    manifests: Mapping[str, str]
    receipt: str | None


@dataclass(frozen=True)
class Made:
    """How one engine was made: what its manifest says, for people.

    ``graph_files`` are the SHA-256 of the files of the graph that it was built from.
    """

    precision: str
    builder: str
    settings: Mapping[str, Any]
    fingerprint: Mapping[str, Any]
    graph: str
    graph_files: Mapping[str, str]
    opset: int
    repo: str | None
    revision: str | None
    synthetic: bool
    weights: str | None
    worst: Mapping[str, float]
    gate: Mapping[str, Any]


@dataclass(frozen=True)
class Receipt:
    """Why the engines of a profile may be served: how they were made, how near and how fast.

    Attributes:
        target: its name in the fleet.
        model: that they are of.
        engines: by component; ``worst`` is the worst distance from fp32 PyTorch at any recorded
            call, ``gate`` what was allowed.
        pictures: PSNR in dB and SSIM of each picture beside the reference's.
        manifests: SHA-256 of the manifests that were validated and timed.
        timing: as of the profile.
        commit: of this repository.
        clean: whether the working copy was that commit's.
    """

    target: str
    model: str
    engines: Mapping[str, Made]
    pictures: tuple[tuple[float, float], ...]
    manifests: Mapping[str, str]
    timing: Timing | None
    commit: str
    clean: bool


@dataclass(frozen=True)
class Release:
    """A model's profiles."""

    model: str
    profiles: tuple[Profile, ...]


def write_receipt(receipt: Receipt, folder: Path) -> str:
    """Write it into a profile's folder; return its SHA-256."""
    write_result(folder / RECEIPT, receipt, version=_RECEIPT)
    return sha256_of_file(folder / RECEIPT)


def write_release(release: Release, folder: Path) -> None:
    """Write what a release holds into its folder."""
    write_result(folder / RELEASE, release, version=_VERSION)


def read_release(folder: Path) -> Release:
    """Read what :func:`write_release` wrote.

    Raises:
        IntegrityError: it is missing, damaged, or of another format.
    """
    return read_result(folder / RELEASE, Release, version=_VERSION, fix=_AGAIN)


def check_profile(profile: Profile, release: Path) -> None:
    """Compare a profile's receipt and manifests with what the release says of them.

    Raises:
        IntegrityError: one of them is missing or altered.
    """
    folder = release / profile.target
    expected = {
        RECEIPT: profile.receipt,
        **{f"{name}/{MANIFEST}": digest for name, digest in profile.manifests.items()},
    }
    for name, digest in expected.items():
        path = folder / name
        found = sha256_of_file(path) if path.is_file() else "no such file"
        if found != digest:
            raise IntegrityError(
                f"{path} is not what {RELEASE} says of it",
                expected=f"sha256 {digest}",
                found=found,
                fix=_AGAIN,
            )


_AGAIN = "copy the release again, or publish it again where it was made: `make publish`"
