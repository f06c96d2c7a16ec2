"""`diffusion-engines fleet` on one machine: DVC and workers for real, stages that pretend."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import psutil
import pytest

from diffusion_engines.failures import Failure
from tests.fleet.pretence import Pretended, make_pretended, states

pytestmark = pytest.mark.fleet

CPU = ["build@cpu-unet", "wrap@cpu-unet", "pack@cpu", "validate@cpu"]
TIMED = ["benchmark@cpu", "generate@cpu"]


@pytest.fixture
def made(tmp_path: Path) -> Pretended:
    """A clone in which nothing has run, with a target that this machine cannot build."""
    return make_pretended(tmp_path, "~targets.blackwell", "~fleet.blackwell")


def test_what_can_be_built_here_is_and_the_rest_is_named(made: Pretended) -> None:
    arguments = ["jobs=2", "~targets.blackwell", "~fleet.blackwell"]
    remote = made.folder / "remote"
    made.clone.run("dvc", "remote", "add", "-q", "-d", "shared", "../remote")
    made.pretend(seconds={"build@rtx-unet": 2.0})

    outcome = made.fleet(*arguments, check=False)

    assert outcome.status == 1
    assert states(outcome.output) == {
        "cpu": "done",
        "rtx": "done",
        "a10": "not here",
        "shared": "done",
        "results": "done",
        "report": "stale",
    }
    assert "missing: a10 (not here), report (stale)" in outcome.output
    ran = Counter(made.stages())
    assert set(ran.values()) == {1}  # what both targets share, too
    assert {*CPU, *TIMED, "build@rtx-unet", "export@unet-fp32", "export@unet-fp16"} <= set(ran)
    assert "report" not in ran
    # Nothing was built while something was timed.
    began = min(run.began for run in made.runs() if run.stage in TIMED)
    assert max(run.ended or 0 for run in made.runs() if run.stage not in TIMED) > 0
    assert all((run.ended or 0) < began for run in made.runs() if run.stage == "build@rtx-unet")
    # What the workers recorded is here, in git's files, in the workspace and on the remote.
    artifacts = made.clone.path / "artifacts"
    assert (artifacts / "bundles/rtx/unet").is_dir()
    assert json.loads((artifacts / "machines/cpu.json").read_text())
    assert made.clone.run("dvc", "status", "-c").output.strip().endswith("are in sync.")
    assert len([path for path in remote.rglob("*") if path.is_file()]) > 10


def test_a_signal_ends_the_workers_and_keeps_what_is_finished(made: Pretended) -> None:
    arguments = ["jobs=1", "~targets.blackwell", "~fleet.blackwell", "~targets.cpu", "~fleet.cpu"]
    arguments += ["measure=[]", "~targets.a10", "~fleet.a10"]
    made.clone.compose(*arguments[1:])
    made.pretend(seconds={"wrap@rtx-unet": 120.0})
    with made.started(*arguments) as command:
        run = made.wait_for("wrap@rtx-unet")
        workers = psutil.Process(command.pid).children(recursive=True)
        assert run.pid in {process.pid for process in workers}

        command.send_signal(signal.SIGTERM)
        output, _ = command.communicate(timeout=60)

    assert command.returncode == 128 + signal.SIGTERM, output
    assert states(output)["rtx"] == "stopped"
    assert "`make fleet` goes on from what was finished" in output
    _, left = psutil.wait_procs(workers, timeout=5)
    assert left == []
    assert "build@rtx-unet" in (made.clone.path / "dvc.lock").read_text()
    made.forget()
    made.pretend()
    made.fleet(*arguments)
    assert set(made.stages()) - {"pack@rtx"} == {"report", "wrap@rtx-unet"}


def test_a_shared_stage_that_fails_stops_what_needs_it_and_nothing_else(made: Pretended) -> None:
    made.pretend(
        fails=[Failure("export@unet-fp16", kind="ExportError", problem="no such operator")]
    )

    outcome = made.fleet("~targets.blackwell", "~fleet.blackwell", check=False)

    assert outcome.status == 1
    found = states(outcome.output)
    assert (found["cpu"], found["rtx"], found["shared"]) == ("done", "failed", "failed")
    assert "build@rtx-unet" not in made.stages()
    assert made.stages().count("export@unet-fp16") == 1
    assert "shared: export@unet-fp16 failed: no such operator" in outcome.output
