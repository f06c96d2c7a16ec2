"""The Dockerfile: nobody here can build it, so that a linter and its own documentation read it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

DOCKERFILE = ROOT / "docker/Dockerfile"
GUIDE = ROOT / "docs/a10.md"
HADOLINT = shutil.which("hadolint", path=Path(sys.executable).parent)


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is there for x86-64 alone")
def test_the_linter_finds_nothing() -> None:
    assert HADOLINT is not None
    command = [HADOLINT, "--failure-threshold", "style", str(DOCKERFILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_guide_names_the_same_container_and_versions() -> None:
    image = re.search(r"^FROM (\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert image is not None
    assert image[1] in GUIDE.read_text()
    pinned = re.findall(r"[a-z-]+==[\d.]+", DOCKERFILE.read_text())
    assert {"torch", "torch-tensorrt", "dllist"} <= {pin.split("==")[0] for pin in pinned}
    for pin in pinned:
        name = pin.split("==")[0]
        assert set(re.findall(rf"(?<![\w-]){name}==[\d.]+", GUIDE.read_text())) <= {pin}


def test_what_it_copies_is_sent_to_it() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    for path in " ".join(copied).split():
        assert (ROOT / path).exists()
        assert f"!{path}" in sent
