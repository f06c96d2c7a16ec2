"""The backend tensorrt under DVC, with doubles of trtexec and of the driver's nvidia-smi.

Says that the stages, their caching and their records fit together; nothing about TensorRT.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffusion_engines import manifests
from tests.doubles.launcher import install
from tests.loras import ATTENTION, write_lora
from tests.tiers import full, long

from .conftest import environment, make_clone

pytestmark = pytest.mark.pipeline

FLEET = """\
# @package _global_
# The VAE decoder for an A10; for tests.
defaults:
  - /target@targets.a10: a10
  - /precision@fleet.a10: fp16
fleet: {a10: {only: [vae_decoder]}}
targets: {a10: {wrap: []}}
measure: []
"""
MIXED_FLEET = """\
# @package _global_
# The VAE decoder for an H100 and for any CPU; for tests.
defaults:
  - /target@targets.cpu: cpu
  - /target@targets.h100: h100
  - /precision@fleet.cpu: fp32
  - /precision@fleet.h100: fp16
fleet: {cpu: {only: [vae_decoder]}, h100: {only: [vae_decoder]}}
targets: {h100: {wrap: []}}
measure: []
"""
GPU = """\
from diffusion_engines.backends import gpus
gpus.find_gpu = lambda: gpus.Gpu({name!r}, {capability!r})
"""


def machine_with(tmp_path: Path, name: str, capability: str) -> dict[str, str]:
    """The environment of a machine that looks like one with a GPU."""
    install(tmp_path / "bin", "trtexec")
    install(tmp_path / "bin", "nvidia-smi", "print('575.57.08')\n")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        GPU.format(name=name, capability=capability)
    )
    return {
        "PATH": f"{tmp_path / 'bin'}:{environment()['PATH']}",
        "PYTHONPATH": f"src:{tmp_path / 'site'}",
        "TRTEXEC_DOUBLE_RELEASE": "10.16",
    }


@pytest.fixture
def a10(tmp_path: Path) -> dict[str, str]:
    return machine_with(tmp_path, "NVIDIA A10", "8.6")


@full
def test_timing_caches_and_records_outlive_the_machine(tmp_path: Path, a10: dict[str, str]) -> None:
    clone = make_clone(tmp_path / "clone")
    (clone.path / "conf/fleet/small.yaml").write_text(FLEET)
    clone.compose()

    refused = clone.repro(check=False)
    assert "cannot build for the target a10" in refused.output
    assert "no GPU that PyTorch sees" in refused.output
    assert "build@a10-vae_decoder" not in refused.ran

    first = clone.repro(env=a10)
    assert {"build@a10-vae_decoder", "wrap@a10-vae_decoder", "timing@a10"} <= first.built
    bundle = clone.path / "artifacts/bundles/a10/vae_decoder"
    assert sorted(p.name for p in bundle.iterdir()) == [
        "engine.plan",
        "layers.json",
        "manifest.json",
    ]
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["builder"] == "trtexec 10.16.0"
    assert manifest["fingerprint"]["gpu"] == "NVIDIA A10"
    log = (clone.path / "artifacts/logs/build/a10-vae_decoder/build.log").read_text()
    assert log.startswith("built by trtexec 10.16.0")
    assert "--stronglyTyped" in log
    (kept,) = (clone.path / "artifacts/timing/a10").glob("*/vae_decoder.cache")
    assert kept.read_text() == "one build\n"

    # Another setting: the build starts from the cache of the last one.
    clone.compose("targets.a10.build.optimization_level=5")
    second = clone.repro(env=a10)
    assert {"build@a10-vae_decoder", "timing@a10"} <= second.built
    assert kept.read_text() == "one build\none build\n"

    # Another release of TensorRT: its own cache, beside the first one.
    third = clone.repro(env=a10 | {"TRTEXEC_DOUBLE_RELEASE": "11.1"})
    assert "build@a10-vae_decoder" in third.built
    caches = sorted((clone.path / "artifacts/timing/a10").glob("*/vae_decoder.cache"))
    assert sorted(path.read_text() for path in caches) == [
        "one build\n",
        "one build\none build\n",
    ]

    # Back to a release and settings that were built: restored. Without the GPU: so are they.
    back = clone.repro(env=a10)
    assert "build@a10-vae_decoder" in back.restored
    clone.commit()
    without = clone.repro()
    assert without.built == set()
    assert "the recorded fingerprint stays" in without.output
    done = clone.run("diffusion-engines", "check-bundle", str(bundle), check=False)
    assert done.status == 1
    assert "library tensorrt is not installed here" in done.output
    assert "Traceback" not in done.output


@long
def test_a_machine_builds_what_it_can_and_names_what_waits(tmp_path: Path) -> None:
    clone = make_clone(tmp_path / "clone")
    (clone.path / "conf/fleet/small.yaml").write_text(MIXED_FLEET)
    h100 = machine_with(tmp_path, "NVIDIA H100 80GB HBM3", "9.0")
    repro = ["diffusion-engines", "repro"]
    built = clone.run(*repro, env=h100)
    assert {"build@h100-vae_decoder", "build@cpu-vae_decoder", "report"} <= built.built
    clone.commit("built on both")

    # A laptop: what it cannot build is there, and nothing waits for anything.
    assert clone.run(*repro).built == set()

    changed = clone.run(*repro, "export.opset=20", check=False)
    assert changed.status == 1
    assert {"build@cpu-vae_decoder", "wrap@cpu-vae_decoder"} <= changed.built
    assert not {"wrap@h100-vae_decoder", "report"} & changed.ran
    said = changed.output.split("not for this machine")[1]
    (row,) = [line for line in said.splitlines() if "H100" in line]
    assert "h100" in row
    assert "H100, compute capability 9.0" in row
    assert "build@h100-vae_decoder" in row
    (stale,) = [line for line in said.splitlines() if line.startswith("Stale")]
    assert "wrap@h100-vae_decoder" in stale
    assert "report" in stale
    assert "cpu" not in stale
    assert "Traceback" not in changed.output

    # The record stays for the machine that it is of, which builds the rest.
    clone.run("git", "diff", "--exit-code", "artifacts/fingerprints")
    done = clone.run(*repro, "export.opset=20", env=h100)
    assert {"build@h100-vae_decoder", "wrap@h100-vae_decoder", "report"} <= done.built
    assert not {"build@cpu-vae_decoder", "export@vae_decoder-fp16"} & done.built


REFIT_FLEET = """\
# @package _global_
# The text encoder for an A10, its plan without weights; for tests.
defaults:
  - /target@targets.a10: a10_stripped
  - /precision@fleet.a10: fp16
fleet: {a10: {only: [text_encoder]}}
measure: []
"""


@long
def test_a_lora_builds_no_stripped_plan(
    tmp_path: Path, a10: dict[str, str], tiny_weights: Path
) -> None:
    clone = make_clone(tmp_path / "clone")
    (clone.path / "conf/fleet/small.yaml").write_text(REFIT_FLEET)
    write_lora(
        clone.path / "loras/wash.safetensors", tiny_weights, {"text_encoder": ATTENTION}, kohya=True
    )
    clone.compose()
    wrap, build = "wrap@a10-text_encoder", "build@a10-text_encoder"
    assert build in clone.repro(build, env=a10).built
    log = (clone.path / "artifacts/logs/build/a10-text_encoder/build.log").read_text()
    assert {"--stripWeights", "--refit"} <= set(log.split())
    built = manifests.read(clone.path / "artifacts/engines/a10/text_encoder", manifests.Engine)
    assert built.model is None
    plain = manifests.read(clone.path / "artifacts/onnx/text_encoder-fp16", manifests.Graph)

    clone.compose("model.loras=[{file: wash.safetensors, weight: 1}]")
    # With a trtexec whose builds fail.
    tuned = clone.repro(wrap, env=a10 | {"TRTEXEC_DOUBLE_FAULT": "no engine"})
    assert {"export@text_encoder-fp16", "simplify@text_encoder-fp16", wrap} <= tuned.built
    assert build not in tuned.built | tuned.restored
    bundle = manifests.read(clone.path / "artifacts/bundles/a10/text_encoder", manifests.Bundle)
    assert [lora.file for lora in bundle.loras] == ["wash.safetensors"]
    assert bundle.files["engine.plan"] == built.files["engine.plan"]
    assert bundle.files["model.onnx"] == plain.files["model.onnx"]
    assert bundle.files["model.onnx.data"] != plain.files["model.onnx.data"]
