"""What a user meets on a bad day, with DVC in the middle."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from diffusion_engines.runs import dvc_processes
from tests.pipeline.conftest import Clone, environment
from tests.tiers import long, long_but
from tests.waiting import wait_for

pytestmark = pytest.mark.pipeline


def start(clone: Clone, *command: str, **variables: str) -> subprocess.Popen[str]:
    """Start a command in a clone."""
    return subprocess.Popen(
        command,
        cwd=clone.path,
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


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
    assert "fleet.rtx.precision: expected one of fp32" in outcome.output
    assert outcome.built == {"check_conf"}


def test_hardware_that_nobody_has_is_explained_at_once(clone: Clone) -> None:
    clone.compose("+target@targets.h100=h100", "+precision@fleet.h100=fp16")
    outcome = clone.repro("probe@h100", check=False)
    assert outcome.status != 0
    assert "expected: H100, compute capability 9.0" in outcome.output
    assert "goes on with the targets that can be built here" in outcome.output
    assert "dvc pull" in outcome.output


def test_a_missed_gate_writes_the_metrics_and_fails(clone: Clone) -> None:
    metrics = clone.path / "artifacts/metrics/validate/cpu.json"
    clone.compose("validate.latents.fp32.rel_l2=1e-12")
    outcome = clone.repro("validate@cpu", check=False)
    assert outcome.status != 0
    assert "latents of image 0, step 1 of 2: rel_l2" in outcome.output
    assert "unet_rel_l2" in metrics.read_text()
    assert (clone.path / "artifacts/validation/cpu/image-00.png").is_file()


def test_a_corrupt_graph_is_caught_by_its_hash(clone: Clone) -> None:
    flip_a_bit(clone.path / "artifacts/onnx/unet-fp16/model.onnx.data")
    done = clone.run(sys.executable, "stages/build.py", "+engine=rtx-unet", check=False)
    assert done.status == 1
    assert "model.onnx.data is damaged" in done.output
    assert "Traceback" not in done.output
    assert (clone.path / "artifacts/engines/rtx/unet/engine.plan").is_file()


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(0o444)  # as DVC keeps the objects of its cache


@long  # tests/unit/test_verify.py has each kind of damage and cure
def test_the_printed_remedy_cures_a_damaged_cache(clone: Clone) -> None:
    folder = clone.path / "artifacts/onnx/unet-fp16"
    graph = folder / "model.onnx.data"
    oid = hashlib.md5(graph.read_bytes()).hexdigest()
    flip_a_bit(clone.path / ".dvc/cache/files/md5" / oid[:2] / oid[2:])
    shutil.rmtree(folder)
    clone.run("dvc", "checkout", "--force")  # of the damaged object, without a word
    done = clone.run(sys.executable, "stages/build.py", "+engine=rtx-unet", check=False)
    remedy = "`rm -rf artifacts/onnx/unet-fp16`, `diffusion-engines verify`, `dvc repro`"
    assert remedy in done.output
    shutil.rmtree(folder)
    verified = clone.run("diffusion-engines", "verify", check=False)
    assert verified.status == 1
    assert f"model.onnx.data: damaged ({oid}); no good copy was found" in verified.output
    assert "`make repro` makes the rest again: simplify@unet-fp16" in verified.output
    assert "simplify@unet-fp16" in clone.repro("build@rtx-unet").ran
    assert hashlib.md5(graph.read_bytes()).hexdigest() == oid
    assert clone.run("diffusion-engines", "verify").status == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("victim", "shell"),  # DVC runs stages in $SHELL, which must not stay in between
    long_but(
        [("make repro", "/bin/sh")],
        [("make repro", "/bin/sh"), ("dvc", "/bin/bash"), ("stage", "/bin/sh")],
    ),
)
def test_a_killed_run_leaves_nothing_and_starts_again(
    clone: Clone, victim: str, shell: str
) -> None:
    clone.compose("export.opset=20")
    command = ["dvc", "repro", "export@unet-fp16"]
    if victim == "make repro":
        command = ["diffusion-engines", "repro", "export.opset=20"]
    run = start(clone, *command, SHELL=shell)
    scratch = clone.path / "artifacts/.tmp"
    assert wait_for(lambda: list(scratch.glob("*unet-fp16")), 300)  # into the work
    (stage,) = processes_of(clone, "export")
    os.kill(stage if victim == "stage" else run.pid, signal.SIGKILL)
    run.communicate(timeout=60)
    assert wait_for(lambda: not processes_of(clone, "export"), 20), "the stage outlived dvc"
    assert not (clone.path / "artifacts/exports/unet-fp16").exists()
    # DVC takes a process that nobody has collected yet for one that runs.
    assert wait_for(lambda: not any(map(psutil.pid_exists, dvc_processes(clone.path))))

    again = clone.repro("export@unet-fp16")

    assert "export@unet-fp16" in again.built
    assert (clone.path / "artifacts/exports/unet-fp16/manifest.json").is_file()
    assert not list(scratch.glob("*unet-fp16"))


@long
def test_two_runs_at_once_do_not_mix(clone: Clone) -> None:
    command = ["diffusion-engines", "repro", "benchmark.repeats=2"]
    first = start(clone, *command)
    lock = clone.path / ".dvc/tmp/repro.lock"
    assert wait_for(lambda: lock.is_file() and lock.read_text().strip() == str(first.pid))
    second = clone.run(*command[:-1], check=False)
    output, _ = first.communicate(timeout=600)
    assert second.status == 1
    assert "another run works in this folder" in second.output
    assert f"process {first.pid}: make repro" in second.output
    assert first.returncode == 0, output
    assert "repeats: 2" in (clone.path / "params.yaml").read_text()


@long
def test_nothing_is_composed_under_a_running_stage(clone: Clone) -> None:
    """DVC hashes params.yaml when a stage has ended: a graph of opset 20 stood there as 22."""
    clone.compose("export.opset=20")
    run = start(clone, "dvc", "repro", "export@unet-fp16")
    assert wait_for(lambda: processes_of(clone, "export"))
    other = "export.opset=22"
    composed = clone.run("diffusion-engines", "compose", other, check=False)
    queued = clone.run("dvc", "exp", "run", "--queue", "-S", other, check=False)
    for refused in (composed, queued):
        assert refused.status != 0
        assert "another run works in this folder" in refused.output
        assert f"process {run.pid}: " in refused.output
    assert processes_of(clone, "export"), "the stage ended before the end of this test"
    output, _ = run.communicate(timeout=600)
    assert run.returncode == 0, output
    assert "opset: 20" in (clone.path / "params.yaml").read_text()
    assert recorded_opset(clone) == 20
    clone.compose(other)  # now it may
    queued = clone.run("dvc", "exp", "run", "--queue", "-S", other)
    assert "Queued experiment" in queued.output


@long
def test_a_stage_does_not_end_well_under_other_parameters(clone: Clone) -> None:
    clone.compose("export.opset=20")
    run = start(clone, "dvc", "repro", "export@unet-fp16")
    assert wait_for(lambda: list((clone.path / "artifacts/.tmp").glob("*unet-fp16")))
    clone.edit("params.yaml", "opset: 20", "opset: 22")  # a person's editor asks nobody
    output, _ = run.communicate(timeout=600)
    assert run.returncode != 0
    assert "params.yaml changed while this stage ran" in output
    assert "export.opset: 20 → 22" in output
    assert recorded_opset(clone) == 18  # of the finished clone
    clone.compose("export.opset=22")
    assert "export@unet-fp16" in clone.repro("export@unet-fp16").ran  # nothing to restore


def recorded_opset(clone: Clone) -> int:
    """The opset that dvc.lock records the graph under."""
    lock = yaml.safe_load((clone.path / "dvc.lock").read_text())
    return lock["stages"]["export@unet-fp16"]["params"]["params.yaml"]["export"]["opset"]


def has_namespaces() -> bool:
    done = subprocess.run(
        ["unshare", "--fork", "--pid", "--mount-proc", "true"], capture_output=True, check=False
    )
    return done.returncode == 0


@pytest.mark.skipif(
    not (shutil.which("unshare") and has_namespaces()), reason="may not start a PID namespace"
)
def test_dvc_may_be_process_1_of_a_container(clone: Clone) -> None:
    in_container = ["unshare", "--fork", "--pid", "--mount-proc"]
    outcome = clone.run(*in_container, "dvc", "repro", "--force", "check_conf")
    assert outcome.ran == {"check_conf"}
