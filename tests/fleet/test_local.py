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
    # Nothing was built while something was timed, whichever came first.
    spans = {run.stage: (run.began, run.ended or 0.0) for run in made.runs()}
    build = spans["build@rtx-unet"]
    for timed in TIMED:
        assert build[1] < spans[timed][0] or spans[timed][1] < build[0], spans
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
        output, _ = command.communicate(timeout=120)

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


def test_two_builds_of_one_target_at_the_same_time_damage_nothing(tmp_path: Path) -> None:
    """In two clones with one cache: the same stages, and their objects, at the same moment."""
    only = ["~targets.blackwell", "~fleet.blackwell", "~targets.cpu", "~fleet.cpu"]
    only += ["~targets.a10", "~fleet.a10", "measure=[]"]
    one, two = (make_pretended(tmp_path / name, *only) for name in ("one", "two"))
    cache = tmp_path / "cache"
    for made in (one, two):
        made.clone.run("dvc", "cache", "dir", "--local", str(cache))
        made.pretend(seconds={"build@rtx-unet": 3.0})

    with one.started(*only) as first, two.started(*only) as second:
        outputs = [command.communicate(timeout=400)[0] for command in (first, second)]

    assert (first.returncode, second.returncode) == (0, 0), outputs
    built = [run for made in (one, two) for run in made.runs() if run.stage == "build@rtx-unet"]
    locks = [(made.clone.path / "dvc.lock").read_text() for made in (one, two)]
    assert 1 <= len(built) <= 2  # the second one may come late enough to restore it
    assert locks[0] == locks[1]
    verified = one.clone.run("diffusion-engines", "verify", "--all")
    assert verified.status == 0, verified.output
