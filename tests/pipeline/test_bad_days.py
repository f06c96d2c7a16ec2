"""What a user meets on a bad day, with DVC in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.conftest import Clone, environment
from tests.waiting import wait_for

pytestmark = pytest.mark.pipeline


def processes_of(clone: Clone, script: str) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            here = (process / "cwd").readlink() == clone.path
        except OSError:
            continue
        # DVC's shell has the script in one long word
        if here and f"stages/{script}.py".encode() in words:
            found.append(int(process.name))
    return found


def test_an_edited_conf_that_was_not_composed_fails_with_the_command(clone: Clone) -> None:
    clone.edit("conf/export/dynamo.yaml", "opset: 18", "opset: 20")
    outcome = clone.repro(check=False)
    assert outcome.status != 0
    assert "conf/ was edited after params.yaml was composed" in outcome.output
    assert "make params" in outcome.output
    assert outcome.built == {"check_conf"}


def test_a_mistake_in_params_stops_before_any_work(clone: Clone) -> None:
    clone.edit("params.yaml", "precision: fp16", "precision: fp17")
    outcome = clone.repro(check=False)
    assert outcome.status != 0
    assert "exports.unet-fp16.precision" in outcome.output
    assert outcome.built == {"check_conf"}


def test_hardware_that_nobody_has_is_explained_at_once(clone: Clone) -> None:
    clone.compose("+target@targets.h100=h100")
    outcome = clone.repro("probe@h100", check=False)
    assert outcome.status != 0
    assert "expected: H100, compute capability 9.0" in outcome.output
    assert "Targets that can be built here: cpu, rtx" in outcome.output
    assert "dvc pull" in outcome.output


def test_a_missed_gate_writes_the_metrics_and_fails(clone: Clone) -> None:
    metrics = clone.path / "artifacts/metrics/validate/cpu.json"
    clone.compose("validate.components.unet.fp32.rel_l2=1e-12")
    outcome = clone.repro("validate@cpu", check=False)
    assert outcome.status != 0
    assert "unet (fp32), call 0: rel_l2" in outcome.output
    assert "unet_rel_l2" in metrics.read_text()
    assert (clone.path / "artifacts/validation/cpu/image-00.png").is_file()


def test_a_corrupt_graph_is_caught_by_its_hash(clone: Clone) -> None:
    path = clone.path / "artifacts/onnx/unet-fp16/model.onnx.data"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    done = clone.run(sys.executable, "stages/build.py", "+engine=rtx-unet", check=False)
    assert done.status == 1
    assert "model.onnx.data is damaged" in done.output
    assert "Traceback" not in done.output
    assert (clone.path / "artifacts/engines/rtx/unet/engine.plan").is_file()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])  # DVC runs stages in $SHELL
@pytest.mark.parametrize("victim", ["dvc", "stage"])
def test_a_killed_run_leaves_nothing_and_starts_again(
    clone: Clone, victim: str, shell: str
) -> None:
    clone.compose("export.opset=20")
    run = subprocess.Popen(
        ["dvc", "repro", "export@unet-fp16"],
        cwd=clone.path,
        env=environment() | {"SHELL": shell},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    scratch = clone.path / "artifacts/.tmp"
    assert wait_for(lambda: list(scratch.glob("*unet-fp16")))  # into the work
    (stage,) = processes_of(clone, "export")
    os.kill(run.pid if victim == "dvc" else stage, signal.SIGKILL)
    run.wait(60)
    assert wait_for(lambda: not processes_of(clone, "export"), 20), "the stage outlived dvc"
    assert not (clone.path / "artifacts/exports/unet-fp16").exists()

    again = clone.repro("export@unet-fp16")

    assert "export@unet-fp16" in again.built
    assert (clone.path / "artifacts/exports/unet-fp16/manifest.json").is_file()
    assert not list(scratch.glob("*unet-fp16"))


def test_two_runs_at_once_do_not_mix(clone: Clone) -> None:
    clone.compose("export.opset=20")
    command = [sys.executable, "-m", "diffusion_engines.repro", "export.opset=20"]
    first = subprocess.Popen(
        command,
        cwd=clone.path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lock = clone.path / ".dvc/tmp/repro.lock"
    assert wait_for(lambda: lock.is_file() and lock.read_text().strip() == str(first.pid))
    second = clone.run(*command[:-1], check=False)
    output, _ = first.communicate(timeout=600)
    assert second.status == 1
    assert "another `make repro` works in this folder" in second.output
    assert str(first.pid) in second.output
    assert first.returncode == 0, output
    assert "opset: 20" in (clone.path / "params.yaml").read_text()
