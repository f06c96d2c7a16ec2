"""The six statements about caching in the design, each counted on DVC itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Clone

pytestmark = pytest.mark.pipeline

OTHER_CPU = """\
from diffusion_engines import cpu
cpu.this_cpu = lambda: cpu.Cpu("another CPU", frozenset({"sse4_2", "ssse3"}))
"""
MEASURED = {"validate@cpu", "benchmark@cpu", "generate@cpu", "report"}


def test_nothing_changed_runs_nothing_but_the_probes(clone: Clone) -> None:
    outcome = clone.repro()

    assert outcome.ran == {"probe@cpu", "probe@rtx", "probe_machine"}


def test_a_new_target_with_a_known_precision_only_adds_its_own_stages(clone: Clone) -> None:
    fleet = "conf/fleet/small.yaml"
    clone.edit(fleet, "exports:", "  - /target@targets.ada: rtx40\nexports:")
    clone.edit(
        fleet,
        "measure:",
        '  ada-unet: {target: ada, backend: "${targets.ada.backend}", component: unet, '
        "precision: fp16}\nmeasure:",
    )
    clone.compose()

    outcome = clone.repro()

    assert "probe@ada" in outcome.ran
    # validate and benchmark track the fleet's engines, to know which components have one
    own = {"build@ada-unet", "wrap@ada-unet", "pack@ada"}
    assert outcome.built - {"check_conf", *MEASURED} == own


def test_a_changed_builder_flag_rebuilds_only_that_target(clone: Clone) -> None:
    clone.edit("conf/build/tensorrt_rtx.yaml", "max_aux_streams: null", "max_aux_streams: 0")
    clone.compose()

    outcome = clone.repro()

    assert "build@rtx-unet" in outcome.built
    assert outcome.built <= {"check_conf", "build@rtx-unet", "wrap@rtx-unet", "report"}


def test_a_changed_fingerprint_rebuilds_only_the_engines_that_depend_on_it(
    clone: Clone, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sitecustomize.py").write_text(OTHER_CPU)

    outcome = clone.repro(env={"PYTHONPATH": f"src:{tmp_path / 'other'}"})

    recorded = json.loads((clone.path / "artifacts/fingerprints/cpu.json").read_text())
    assert recorded["instruction_set"] == "x86-64-v2"
    assert "build@cpu-unet" in outcome.built
    assert outcome.built <= {"build@cpu-unet", "wrap@cpu-unet", *MEASURED}


def test_going_back_restores_from_the_run_cache(clone: Clone) -> None:
    clone.compose("targets.rtx.build.max_aux_streams=0", "export.opset=20")
    changed = clone.repro()
    assert {"export@unet-fp16", "build@rtx-unet", "build@cpu-unet"} <= changed.built

    clone.compose()
    back = clone.repro()

    assert back.built == set()
    assert {"export@unet-fp16", "build@rtx-unet", "build@cpu-unet"} <= back.restored


def test_a_second_clone_with_the_remote_executes_nothing(clone: Clone, tmp_path: Path) -> None:
    clone.run("dvc", "remote", "add", "-d", "shared", str(tmp_path / "remote"))
    clone.commit("remote")
    clone.run("dvc", "push")
    second = Clone(tmp_path / "second")
    clone.run("git", "clone", "-q", ".", str(second.path))

    outcome = second.repro("--pull")

    assert outcome.ran == {"probe@cpu", "probe@rtx", "probe_machine"}
    assert (second.path / "artifacts/bundles/rtx/unet/engine.plan").is_file()
    assert (second.path / "artifacts/report/index.html").is_file()
    assert not second.run("git", "status", "--porcelain").output.strip()


def test_a_sweep_of_two_points_does_the_common_work_once(clone: Clone) -> None:
    clone.run("dvc", "exp", "run", "--queue", "-S", "export.opset=18,20")
    outcome = clone.run("dvc", "exp", "run", "--run-all")

    # opset 18 is the workspace's own state; only 20 has anything to do
    table = json.loads(clone.run("dvc", "exp", "show", "--json").output)
    (base,) = [row for row in table if row["rev"] != "workspace"]
    opsets = {
        experiment["revs"][0]["data"]["params"]["params.yaml"]["data"]["export"]["opset"]
        for experiment in base["experiments"]
    }
    assert opsets == {18, 20}, outcome.output
    printed = clone.run("python", "-m", "diffusion_engines.experiments").output.splitlines()
    header = next(line.split() for line in printed if "experiment" in line)
    assert header[3] == "export.opset"  # the one parameter that differs
    assert {"psnr", "unet_rel_l2", "denoiser_ms"} < set(header)
    assert not any("." in name for name in header[4:])
    manifests = []
    for experiment in base["experiments"]:
        clone.run("dvc", "exp", "apply", experiment["name"])
        clone.run("dvc", "checkout")
        manifest = clone.path / "artifacts/bundles/rtx/unet/manifest.json"
        manifests.append(json.loads(manifest.read_text())["onnx"]["opset"])
    assert sorted(manifests) == [18, 20]
    # The run-cache has an entry for each time that a stage really ran.
    ran = [
        path.read_text().split("deps:")[0]
        for path in (clone.path / ".dvc/cache/runs").glob("*/*/*")
    ]
    assert sum("stages/download.py" in text for text in ran) == 1
    assert sum("stages/reference.py" in text for text in ran) == 1
    assert sum("stages/export.py +onnx=unet-fp16" in text for text in ran) == 2
