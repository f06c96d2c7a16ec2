"""A signed folder is loaded as its owner signed it, and not otherwise."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from diffusion_engines import load_pipeline, manifests
from diffusion_engines.errors import HardwareError, IntegrityError
from diffusion_engines.files import write_json
from diffusion_engines.serve import signing
from diffusion_engines.serve.signing import check_signature


def make_key(folder: Path) -> Path:
    """Write a key of an elliptic curve, and its public half, which is returned."""
    ec = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    key = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    (folder / "private.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public = folder / "public.pem"
    public.write_bytes(
        key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return public


@pytest.fixture
def signed(tiny_bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A signed folder, the key beside it, and no network."""
    cli = pytest.importorskip("model_signing._cli", reason="needs the extra [signing]")
    testing = pytest.importorskip("click.testing")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("it asks the network"))
    public = make_key(tmp_path)
    folder = tmp_path / "cpu"
    shutil.copytree(tiny_bundles, folder)
    (folder / ".gitignore").write_text("/unet\n")  # of DVC
    # As docs/serving.md has it.
    command = ["sign", "key", str(folder), "--private_key", str(tmp_path / "private.pem")]
    command += ["--signature", str(folder / "model.sig")]
    done = testing.CliRunner().invoke(cli.main, command)
    assert done.exit_code == 0, done.output
    check_signature(folder, public)
    return folder


def rewritten(folder: Path) -> None:
    """Change what a pipeline says, and its manifest with it, as an attacker would."""
    config = folder / "pipeline/scheduler/scheduler_config.json"
    write_json(config, json.loads(config.read_text()) | {"beta_end": 0.02})
    rest = folder / "pipeline"
    manifests.write(rest, manifests.read(rest, manifests.Pipeline, verify=False))


@pytest.mark.parametrize(
    "change",
    [
        rewritten,
        lambda folder: (folder / "more").write_text("more"),
        lambda folder: (folder / "vae_decoder/engine.onnx.data").unlink(),
        lambda folder: (folder / "model.sig").write_text("{}"),
        lambda folder: (folder / "model.sig").unlink(),
        lambda folder: make_key(folder.parent),  # another's
    ],
    ids=["rewritten", "more", "less", "no signature", "no file", "another key"],
)
def test_anything_else_than_what_was_signed_is_refused(signed: Path, change: Any) -> None:
    public = signed.parent / "public.pem"
    load_pipeline(signed, public_key=public)
    change(signed)
    with pytest.raises(IntegrityError, match=r"is not what the owner|there is no signature"):
        load_pipeline(signed, public_key=public)


def test_without_the_library_it_is_named(
    tiny_bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(module: str, install: str) -> None:
        raise HardwareError(f"the library {module} is not installed here", fix=install)

    monkeypatch.setattr(signing, "require", missing)
    with pytest.raises(HardwareError, match=r"model_signing(.|\n)*\[signing\]"):
        load_pipeline(tiny_bundles, public_key=tmp_path / "public.pem")
