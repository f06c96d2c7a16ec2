"""A release goes through a real registry and comes back, byte for byte."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from diffusion_engines.layout import Workspace
from diffusion_engines.release.oci import read_layout, write_layout
from diffusion_engines.release.publishing import publish
from tests.unit.release.conftest import files_of, workspace

__all__ = ["workspace"]  # a fixture
pytestmark = pytest.mark.fleet
_CONFIG = """\
version: 0.1
log: {{level: warn}}
storage: {{filesystem: {{rootdirectory: {folder}/blobs}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """The address of a server of the distribution specification: Debian's `docker-registry`."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("no docker-registry: `apt-get install docker-registry`")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    config = tmp_path / "registry.yml"
    config.write_text(_CONFIG.format(folder=tmp_path / "registry", port=port))
    with (tmp_path / "registry.log").open("w") as log:
        server = subprocess.Popen([program, "serve", str(config)], stdout=log, stderr=log)
    try:
        _wait(f"http://127.0.0.1:{port}/v2/", server)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)


def _wait(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(100):
        assert server.poll() is None, "the registry ended"
        try:
            if requests.get(url, timeout=5).ok:
                return
        except requests.ConnectionError:
            pass
        time.sleep(0.1)
    raise TimeoutError(url)


def test_a_release_that_was_pushed_is_pulled_as_it_was(
    registry: str, workspace: Workspace, tmp_path: Path
) -> None:
    oras = pytest.importorskip("oras.layout", reason="needs the package oras")
    provider = pytest.importorskip("oras.provider").Registry(insecure=True)
    publish(workspace, ["cpu"], tmp_path / "release")
    digest = write_layout(tmp_path / "release", tmp_path / "layout")

    oras.NewLayout(str(tmp_path / "layout")).push_to_registry(provider, f"{registry}/lemon:v1")
    pulled = tmp_path / "pulled"
    pulled.mkdir()
    oras.NewLayoutFromRegistry(str(pulled), provider, f"{registry}/lemon:v1")

    assert read_layout(pulled, tmp_path / "back") == digest
    assert files_of(tmp_path / "back") == files_of(tmp_path / "release")
    head = {"Accept": "application/vnd.oci.image.manifest.v1+json"}
    answer = requests.head(f"http://{registry}/v2/lemon/manifests/v1", headers=head, timeout=10)
    assert answer.headers["Docker-Content-Digest"] == digest
