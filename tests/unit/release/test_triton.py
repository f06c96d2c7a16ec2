"""A release as a model repository of Triton, held against the schema of its configurations."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pool, message_factory, text_format

from diffusion_engines import load_component, manifests
from diffusion_engines.cli import main
from diffusion_engines.errors import IntegrityError
from diffusion_engines.layout import Workspace
from diffusion_engines.manifests import Bundle
from diffusion_engines.release.publishing import publish
from diffusion_engines.release.triton import CONFIG, export_triton
from tests.composition import ROOT, composed
from tests.unit.release.conftest import COMPONENTS, measure

SCHEMA = ROOT / "tests" / "data" / "triton_model_config.binpb"


def config_of(model: Path) -> Any:
    """A model's configuration, read with Triton's own schema: what it does not know is an error."""
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(SCHEMA.read_bytes())
    message = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))
    return text_format.Parse((model / CONFIG).read_text(), message())


def add_plans(workspace: Workspace, target: str, settings: dict[str, Any], **changes: Any) -> None:
    """Add a target of TensorRT, whose plans are a few bytes."""
    shutil.copytree(workspace.bundles("cpu"), workspace.bundles(target))
    for name in COMPONENTS:
        folder = workspace.bundle(target, name)
        found = manifests.read(folder, Bundle)
        for path in folder.iterdir():
            path.unlink()
        (folder / "engine.plan").write_bytes(f"{target} {name}".encode())
        made = {
            "name": f"{target}-{name}",
            "target": target,
            "backend": settings["backend"],
            "engine": "engine.plan",
            "settings": settings,
            "fingerprint": {"compute_capability": settings["compute_capability"]},
        }
        manifests.write(folder, dataclasses.replace(found, **made | changes))
    measure(workspace, target, gpus=(target,))


@pytest.fixture
def release(workspace: Workspace, tmp_path: Path) -> Path:
    """Engines for the CPU, for two kinds of GPU, and for a third of the first one's capability."""
    targets = composed("fleet=datacenter", "model=sd14")["targets"]
    add_plans(workspace, "a10", targets["a10"])
    add_plans(workspace, "h100", targets["h100"])
    add_plans(workspace, "h200", targets["h200"])
    publish(workspace, ["a10", "cpu", "h100", "h200"], tmp_path / "release")
    return tmp_path / "release"


def test_each_component_is_a_model_with_a_plan_for_each_compute_capability(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = tmp_path / "models"
    main(["export-triton", str(release), str(repository)])

    # Two GPUs of one compute capability have plans of their own, and Triton knows no more than it.
    printed = capsys.readouterr().out
    assert "h200 is not in it: a faster text_encoder-tensorrt for compute capability 9.0" in printed
    assert {path.name for path in repository.iterdir()} == {
        f"{name}-{backend}" for name in COMPONENTS for backend in ("tensorrt", "onnxruntime-cpu")
    }
    plan = config_of(repository / "unet-tensorrt")
    assert (plan.name, plan.backend, plan.max_batch_size) == ("unet-tensorrt", "tensorrt", 0)
    assert dict(plan.cc_model_filenames) == {"8.6": "a10.plan", "9.0": "h100.plan"}
    # Without a default, a GPU of another capability gets none.
    assert plan.default_model_filename == ""
    assert (repository / "unet-tensorrt/1/a10.plan").read_bytes() == b"a10 unet"
    assert [one.kind for one in plan.instance_group] == [plan.instance_group[0].KIND_GPU]
    latents = plan.input[0]
    assert (latents.name, list(latents.dims)) == ("input_0", [2, 4, 16, 16])
    digest = manifests.digest(release / "a10" / "unet")
    assert plan.parameters["manifest_sha256.a10"].string_value == digest


def test_what_onnx_runtime_takes_is_a_bundle_that_our_own_loader_takes(
    release: Path, tmp_path: Path
) -> None:
    export_triton(release, tmp_path / "models")

    model = tmp_path / "models" / "unet-onnxruntime-cpu"
    config = config_of(model)
    assert config.backend == "onnxruntime"
    assert (model / "1" / config.default_model_filename).is_file()
    assert not config.cc_model_filenames
    assert [one.kind for one in config.instance_group] == [config.instance_group[0].KIND_CPU]
    engine = load_component(model / "1")
    assert [tensor.name for tensor in config.input] == [
        spec.name for spec in engine.manifest.inputs
    ]
    assert [tuple(tensor.dims) for tensor in config.input] == [
        spec.size for spec in engine.manifest.inputs
    ]
    assert [(tensor.name, list(tensor.dims)) for tensor in config.output] == [
        ("output_0", [2, 4, 16, 16])
    ]


def test_what_triton_cannot_run_is_named(workspace: Workspace, tmp_path: Path) -> None:
    targets = composed("fleet=datacenter", "model=sd14")["targets"]
    stripped = targets["a10"] | {"build": targets["a10"]["build"] | {"weights": "stripped"}}
    add_plans(workspace, "a10", stripped | {"wrap": []})
    publish(workspace, ["a10"], tmp_path / "release")
    with pytest.raises(IntegrityError, match="its plans have no weights"):
        export_triton(tmp_path / "release", tmp_path / "models")
    assert not (tmp_path / "models").exists()
