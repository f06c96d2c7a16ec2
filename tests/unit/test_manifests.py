"""A manifest notices damage, says what it lacks, and knows its format."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffusion_engines import manifests
from diffusion_engines.errors import IntegrityError
from diffusion_engines.families.base import Dim, TensorSpec
from diffusion_engines.files import write_json
from diffusion_engines.manifests import (
    Bundle,
    Engine,
    File,
    FusedLora,
    Graph,
    Pipeline,
    Reference,
    Weights,
)
from tests.conftest import ROOT
from tests.manifests import bundle_manifest, engine_manifest, graph_manifest, weights_manifest

# Written by the stages as they were before there were format numbers.
FORMAT_1 = ROOT / "tests/data/format-1"
LORA = FusedLora("ink.safetensors", "0" * 64, 0.8, layers=56)
OPEN = TensorSpec("input_0", "latents", "component", (Dim("batch", 2, 2, 8, 2), 4, 16, 16))
WRITTEN: tuple[Any, ...] = (
    weights_manifest(loras=(LORA,), parameters=7),
    Reference(3),
    graph_manifest(inputs=[OPEN], weights=weights_manifest(loras=(LORA,))),
    engine_manifest(graph=graph_manifest(inputs=[OPEN])),
    bundle_manifest(torchscript={"torch": "2.13"}),
    Pipeline("m", "hub/m", "133a", synthetic=False, loras={"unet": (LORA,)}, weights={"unet": "0"}),
)


@pytest.mark.parametrize("manifest", WRITTEN, ids=lambda manifest: manifest.kind)
def test_what_is_written_is_read(tmp_path: Path, manifest: Any) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/data").write_bytes(b"0123456789")
    manifests.write(tmp_path, manifest)
    found = manifests.read(tmp_path, type(manifest))
    assert replace(found, files={}) == replace(manifest, files={})
    assert list(found.files) == ["deep/data"]
    assert found.files["deep/data"].bytes == 10
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert (written["kind"], written["format"]) == (manifest.kind, 3)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda p: p.write_bytes(b"0123456x89"), "is damaged"),
        (lambda p: p.write_bytes(b"01234"), "wrong size"),
        (lambda p: p.unlink(), "is missing"),
    ],
)
def test_damage_is_noticed(tmp_path: Path, damage: Any, expected: str) -> None:
    (tmp_path / "weights").write_bytes(b"0123456789")
    manifests.write(tmp_path, graph_manifest(name="unet"))
    assert manifests.read(tmp_path, Graph).name == "unet"
    damage(tmp_path / "weights")
    with pytest.raises(IntegrityError, match=expected) as raised:
        manifests.read(tmp_path, Graph)
    assert "dvc repro" in str(raised.value)
    assert manifests.read(tmp_path, Graph, skip="wei*").name == "unet"
    assert manifests.read(tmp_path, Graph, only=("other",)).name == "unet"


def test_another_kind_of_folder_is_refused(tmp_path: Path) -> None:
    manifests.write(tmp_path, bundle_manifest())
    with pytest.raises(IntegrityError, match="something else") as raised:
        manifests.read(tmp_path, Engine)
    assert "found:    bundle" in str(raised.value)


def test_a_missing_or_broken_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="does not exist"):
        manifests.read(tmp_path, Graph)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(IntegrityError, match="not valid JSON"):
        manifests.read(tmp_path, Graph)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"kind": "on\xff"}', "not valid JSON"),  # a flipped byte need not be text
        (b"[]", "is no manifest"),
        (b"[" * 100_000, "not valid JSON"),
        (b"1" * 5_000, "not valid JSON"),
        (b'{"kind": "onnx"}', "is no manifest"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(IntegrityError, match=expected) as raised:
        manifests.read(tmp_path, Graph)
    assert "dvc repro" in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"opset": None}, "opset: Input should be a valid integer"),
        (
            {"inputs": [{"name": "input_0", "role": "latents", "dtype": "int4", "shape": []}]},
            "dtype",
        ),
        ({"files": {"model.onnx": {"bytes": 3}}}, r"files.model.onnx.sha256: Field required"),
        ({"guidanse": True}, "guidanse: Unexpected keyword"),  # its default would do else
        ({"loras": [{"file": "ink.safetensors"}]}, r"loras.0.sha256: Field required"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, changes: dict[str, Any], where: str) -> None:
    manifests.write(tmp_path, graph_manifest())
    path = tmp_path / "manifest.json"
    write_json(path, json.loads(path.read_text()) | changes)
    with pytest.raises(IntegrityError, match="is incomplete") as raised:
        manifests.read(tmp_path, Graph)
    assert where in str(raised.value)
    assert "dvc repro" in str(raised.value)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    manifests.write(tmp_path, engine_manifest())
    path = tmp_path / "manifest.json"
    written = json.loads(path.read_text())
    for key in set(written) - {"kind", "files", "format"}:
        write_json(path, {name: value for name, value in written.items() if name != key})
        with pytest.raises(IntegrityError, match=rf"{key}: Field required"):
            manifests.read(tmp_path, Engine)


@pytest.mark.parametrize("number", [4, 0, "3", None])
def test_a_format_of_another_version_is_refused(tmp_path: Path, number: object) -> None:
    manifests.write(tmp_path, graph_manifest())
    path = tmp_path / "manifest.json"
    written = json.loads(path.read_text()) | {"format": number}
    write_json(path, {key: written[key] for key in ("files", "format", "kind")})  # of any shape
    with pytest.raises(IntegrityError, match="has another format") as raised:
        manifests.read(tmp_path, Graph)
    for text in (
        "expected: format 3",
        f"found:    format {number}",
        "install the version",
        "rm -rf",
    ):
        assert text in str(raised.value)


@pytest.mark.parametrize("kind", [Weights, Reference, Graph, Engine, Bundle, Pipeline])
def test_format_1_is_read_and_written_again_with_additions_alone(tmp_path: Path, kind: Any) -> None:
    content = (FORMAT_1 / f"{kind.kind}.json").read_text()
    (tmp_path / "manifest.json").write_text(content)
    manifests.write(tmp_path, manifests.read(tmp_path, kind, verify=False))
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert without(written, json.loads(content)) == json.loads(content) | {"files": {}}


def without(written: Any, old: Any) -> Any:
    """What of new JSON has a place in the old one."""
    if not (isinstance(written, dict) and isinstance(old, dict)):
        return written
    return {key: without(value, old[key]) for key, value in written.items() if key in old}


def test_what_format_1_did_not_record_is_unknown(tmp_path: Path) -> None:
    for kind in (Graph, Pipeline):
        (tmp_path / kind.kind).mkdir()
        content = (FORMAT_1 / f"{kind.kind}.json").read_bytes()
        (tmp_path / kind.kind / "manifest.json").write_bytes(content)
    graph = manifests.read(tmp_path / "onnx", Graph, verify=False)
    assert (graph.weights, graph.seed, graph.compared) == (None, None, True)
    assert manifests.read(tmp_path / "pipeline", Pipeline, verify=False).weights == {}


def test_a_digest_is_of_every_file_and_of_nothing_else() -> None:
    weights = weights_manifest(files={"config.json": File(1, "a" * 64), "x": File(1, "b" * 64)})
    assert replace(weights, model="other", seed=3).digest == weights.digest
    other_order = dict(sorted(weights.files.items(), reverse=True))
    assert replace(weights, files=other_order).digest == weights.digest
    for name in weights.files:
        changed = {**weights.files, name: File(1, "c" * 64)}
        assert replace(weights, files=changed).digest != weights.digest
