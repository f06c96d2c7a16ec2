"""The six statements about caching in the design, each counted on DVC itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiers import full

from .conftest import Clone
from .machines import Machine

pytestmark = pytest.mark.pipeline

PROBES = {"probe@cpu", "probe@rtx", "probe_machine@cpu"}
# What depends on the engines of the one target that is measured.
MEASURED = {"validate@cpu", "benchmark@cpu", "generate@cpu", "report"}


def test_nothing_changed_runs_nothing_but_the_probes(clone: Clone) -> None:
    assert clone.repro().ran == PROBES


def test_a_new_target_with_a_known_precision_only_adds_its_own_stages(clone: Clone) -> None:
    clone.add_target("ada", "rtx40", "fp16")

    outcome = clone.repro()

    assert outcome.ran - PROBES == {
        *("check_conf", "probe@ada", "build@ada-unet", "wrap@ada-unet", "pack@ada", "report")
    }


@full
def test_a_new_measured_target_leaves_the_measured_one_alone(clone: Clone) -> None:
    clone.add_target("other", "cpu", "fp32", measured=True)

    outcome = clone.repro()

    own = {"probe", "probe_machine", "pack", "validate", "benchmark", "generate"}
    assert outcome.ran - PROBES == {
        *("check_conf", "build@other-unet", "wrap@other-unet", "report"),
        *(f"{stage}@other" for stage in own),
    }


def test_a_changed_builder_flag_rebuilds_only_that_target(clone: Clone) -> None:
    clone.edit("conf/build/tensorrt_rtx.yaml", "max_aux_streams: null", "max_aux_streams: 0")
    planned = json.loads(clone.run("diffusion-engines", "plan", "--json", check=False).output)

    outcome = clone.run("diffusion-engines", "repro")

    assert "build@rtx-unet" in outcome.built
    assert outcome.built <= {"check_conf", "build@rtx-unet", "wrap@rtx-unet", "report"}
    ways = {stage["stage"]: stage["outcome"] for stage in planned["stages"]}
    assert {stage for stage, way in ways.items() if way == "runs"} <= outcome.built
    assert outcome.built <= {stage for stage, way in ways.items() if way in ("runs", "may run")}
    # Each stage says why it runs, and keeps it.
    change = "targets.rtx.build.max_aux_streams: null → 0"
    engine = "artifacts/engines/rtx/unet is another one (build@rtx-unet ran)"
    for stage, reason in (("build", change), ("wrap", engine)):
        assert f"  because {reason}\n" in outcome.output
        run = json.loads((clone.path / f"artifacts/logs/{stage}/rtx-unet/run.json").read_text())
        assert run["reasons"] == [reason]
        assert 0 < run["seconds"] < 900


def test_a_changed_fingerprint_rebuilds_only_the_engines_that_depend_on_it(
    clone: Clone, tmp_path: Path
) -> None:
    older = Machine('flags=frozenset({"sse4_2", "ssse3"})')

    outcome = clone.repro("validate@cpu", "wrap@rtx-unet", env=older.env(tmp_path))

    recorded = json.loads((clone.path / "artifacts/fingerprints/cpu.json").read_text())
    assert recorded["instruction_set"] == "x86-64-v2"
    assert outcome.built == {"build@cpu-unet", "wrap@cpu-unet", "validate@cpu"}


def test_going_back_restores_from_the_run_cache(clone: Clone) -> None:
    clone.compose("targets.rtx.build.max_aux_streams=0", "export.opset=20")
    changed = clone.repro("wrap@rtx-unet")
    assert {"export@unet-fp16", "build@rtx-unet", "wrap@rtx-unet"} <= changed.built

    clone.compose()
    back = clone.repro()

    assert back.built == set()
    assert {"export@unet-fp16", "build@rtx-unet", "wrap@rtx-unet"} <= back.restored


def test_a_second_clone_with_the_remote_executes_nothing(clone: Clone, tmp_path: Path) -> None:
    clone.run("dvc", "remote", "add", "-d", "shared", str(tmp_path / "remote"))
    clone.commit("remote")
    clone.run("dvc", "push")
    second = Clone(tmp_path / "second")
    clone.run("git", "clone", "-q", ".", str(second.path))

    outcome = second.repro("--pull")

    assert outcome.ran == PROBES
    assert (second.path / "artifacts/bundles/rtx/unet/engine.plan").is_file()
    assert (second.path / "artifacts/report/index.html").is_file()
    assert not second.run("git", "status", "--porcelain").output.strip()
