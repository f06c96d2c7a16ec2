"""PyTorch's compiler in the DAG: what other weights reuse, and which PyTorch a program needs."""

from __future__ import annotations

import json

import pytest

from diffusion_engines import manifests
from diffusion_engines.bench.results import OTHER_ENGINES, read_benchmark
from diffusion_engines.config import ENGINES
from diffusion_engines.layout import Workspace
from diffusion_engines.release.chosen import read_chosen
from tests.pipeline.conftest import Clone

pytestmark = [pytest.mark.pipeline, pytest.mark.long]


def test_other_weights_keep_the_package(clone: Clone) -> None:
    clone.add_target("compiled", "cpu_inductor", "fp32", measured=True)
    only = "compiled: {only: [unet]"
    clone.edit("conf/fleet/small.yaml", only, f"{only}, alternative_to: cpu")
    clone.compose()

    outcome = clone.repro()

    made = {
        *("export_program@compiled-unet", "build@compiled-unet", "wrap@compiled-unet"),
        *("pack@compiled", "validate@compiled", "benchmark@compiled", "generate@compiled"),
        *("check_conf", "choose@cpu", "report"),
    }
    assert outcome.built == made  # and nothing of the targets that were there
    workspace = Workspace(clone.path)
    metrics = json.loads(workspace.metrics("validate", "compiled").read_text())
    assert metrics["unet_rel_l2"] < 1e-5
    page = (workspace.report / "index.html").read_text()
    assert "torch.export" in page
    timed = read_benchmark(workspace.benchmark("compiled"))
    assert timed.runners == ("pytorch", OTHER_ENGINES, ENGINES)
    assert timed.beside == {"unet": manifests.digest(workspace.bundle("cpu", "unet"))}
    chosen = read_chosen(workspace.alternatives("cpu"))
    assert [profile.target for profile in chosen.profiles] == ["cpu", "compiled"]
    # One repeat, which tells nothing.
    assert chosen.components["unet"].target == "cpu"
    assert "Which engines are loaded on the hardware of cpu" in page
    assert clone.repro().built == set()

    clone.commit("compiled")
    again = clone.run("diffusion-engines", "reproduce", "artifacts/bundles/compiled/unet")
    assert again.ran == {f"{s}@compiled-unet" for s in ("export_program", "build", "wrap")}
    # Else within the gates, which a later PyTorch may have it come to; its status says so too.
    assert "bit-identical: 3 files" in again.output

    clone.edit("conf/model/tiny.yaml", "seed: 0", "seed: 1")
    clone.compose()
    clone.repro("download")
    changed = clone.run("dvc", "status").output
    assert "wrap@compiled-unet" in changed  # it adds the weights
    assert "export@unet-fp16" in changed  # ONNX graphs have them inside
    for stage in ("export_program@compiled-unet", "build@compiled-unet"):
        assert stage not in changed


def test_a_program_waits_for_the_pytorch_of_its_target(clone: Clone) -> None:
    clone.add_target("compiled", "cpu_inductor", "fp32")
    clone.repro("probe@compiled")
    path = Workspace(clone.path).fingerprint("compiled")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"torch": "9.9.0"}))

    refused = clone.run("python", "stages/export_program.py", "+engine=compiled-unet", check=False)

    assert refused.status != 0
    assert "engines of the target compiled are built with another PyTorch" in refused.output
    assert "expected: 9.9.0" in refused.output
