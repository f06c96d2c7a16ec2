"""`diffusion-engines fleet launcher=slurm` on Slurm's daemons: two virtual nodes, no accounting.

DVC, submitit and the workers run for real; the stages pretend. What a job is judged by, at each of
its turns: tests/unit/fleet/test_slurm.py.
"""

from __future__ import annotations

import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import psutil
import pytest

from tests.fleet.pretence import Pretended, make_pretended, states
from tests.fleet.slurm import Cluster, cluster, why_not

pytestmark = pytest.mark.fleet

# Which target's engines are built on which node, by the features that the launcher asks for.
NODES = {"a10": "node1", "cpu": "node2", "rtx": "node2"}
LAUNCHER = """\
# Two virtual nodes; for tests.
kind: slurm
patience_seconds: 20
default: {partition: main, constraint: other, gres: null, minutes: 5, cpus: 1, memory_gb: null}
targets:
  a10: {constraint: a10}
"""
SLURM = ["launcher=slurm", "~targets.blackwell", "~fleet.blackwell"]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """The cluster; its folder is short, as a socket's path has to be."""
    if reason := why_not():
        pytest.fail(f"there can be no Slurm here: {reason}")  # a skip would pass in CI
    folder = Path(mkdtemp(prefix="slurm-"))
    with cluster(folder, {"node1": "a10", "node2": "other"}) as made:
        yield made
    shutil.rmtree(folder)


@pytest.fixture
def made(nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pretended:
    """A clone in which nothing has run, and an environment that finds the cluster."""
    for name, value in nodes.env.items():
        monkeypatch.setenv(name, value)
    made = make_pretended(tmp_path, *SLURM[1:])
    (made.clone.path / "conf/launcher/slurm.yaml").write_text(LAUNCHER)
    made.clone.commit("launcher")
    made.pretend(nodes={f"build@{target}-unet": node for target, node in NODES.items()})
    return made


def test_each_target_is_built_once_where_it_fits_and_then_nothing_runs(made: Pretended) -> None:
    outcome = made.fleet(*SLURM)

    assert states(outcome.output) == {
        **dict.fromkeys(["cpu", "rtx", "a10", "shared", "report"], "done")
    }
    assert set(Counter(made.stages()).values()) == {1}
    for run in made.runs():
        _, _, key = run.stage.partition("@")
        assert run.node == NODES.get(key.partition("-")[0], "here"), run.stage
    assert made.stages().count("report") == 1
    # Recorded here, though no machine here has that GPU; and with it nothing is left to do.
    assert (made.clone.path / "artifacts/fingerprints/a10.json").is_file()
    made.clone.commit("built")
    made.forget()

    outcome = made.fleet(*SLURM)

    assert made.runs() == []
    assert set(states(outcome.output).values()) == {"current"}
    assert not made.clone.run("git", "status", "--porcelain").output.strip()


def test_a_node_that_dies_in_a_build_is_reported_within_a_minute(
    made: Pretended, nodes: Cluster
) -> None:
    made.pretend(seconds={"build@a10-unet": 300.0})
    with made.started(*SLURM) as command:
        run = made.wait_for("build@a10-unet")
        nodes.kill_node("node1")
        died = time.monotonic()
        assert command.stdout
        try:
            while not re.search(r" a10 +failed ", line := command.stdout.readline()):
                assert line, "it ended, and never said so"
            assert time.monotonic() - died < 60
            output, _ = command.communicate(timeout=240)
        finally:
            nodes.start_node("node1")
    assert not psutil.pid_exists(run.pid)
    assert command.returncode == 1
    found = states(output)
    assert (found["a10"], found["rtx"], found["cpu"]) == ("failed", "done", "done")
    assert "node1" in output
    assert "missing: a10 (failed), report (stale)" in output


def test_an_interrupt_cancels_what_is_queued_and_ends_what_runs(
    made: Pretended, nodes: Cluster
) -> None:
    made.pretend(seconds={"build@cpu-unet": 300.0})
    with made.started(*SLURM, "~targets.a10", "~fleet.a10") as command:
        run = made.wait_for("build@cpu-unet")  # the first in the queue
        # One node has the feature, and one core.
        assert sorted(nodes.jobs()) == ["PENDING", "RUNNING"]
        command.send_signal(signal.SIGINT)
        output, _ = command.communicate(timeout=120)

    assert command.returncode == 128 + signal.SIGINT
    assert nodes.jobs() == []
    assert not psutil.pid_exists(run.pid)
    found = states(output)
    assert (found["rtx"], found["cpu"]) == ("stopped", "stopped")


def test_what_the_cluster_does_not_have_is_refused_by_name(made: Pretended) -> None:
    outcome = made.fleet(
        *SLURM,
        "launcher.targets.a10.constraint=a11",
        "~targets.cpu",
        "~fleet.cpu",
        "measure=[]",
        check=False,
    )

    assert outcome.status == 1
    found = states(outcome.output)
    assert (found["a10"], found["rtx"]) == ("failed", "done")
    assert "Slurm refuses the job for a10" in outcome.output
