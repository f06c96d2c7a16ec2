"""A sweep to its end, by real DVC in a small repository whose stages are quick."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from diffusion_engines.cli import main
from diffusion_engines.compose import composed_params
from diffusion_engines.errors import HardwareError
from diffusion_engines.sweeps import running
from diffusion_engines.sweeps.measured import SWEEPS, read_point
from diffusion_engines.sweeps.work import (
    PointWork,
    Space,
    StageWork,
    check_space,
    space_of,
    startable,
    work_of,
)
from tests.composition import ROOT
from tests.pipeline.conftest import Clone
from tests.pipeline.pretence import compose_in
from tests.reports import make_fleet
from tests.tiers import long
from tests.waiting import wait_for

pytestmark = [
    pytest.mark.pipeline,
    # Of pygtrie, in DVC's own code.
    pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning"),
]

# Two stages of every point, and one that all of them share. What the second one does is chosen by
# the point's opset.
DVC_YAML = """\
stages:
  download:
    cmd: exec python stage.py
    params: [model.name]
    deps: [data]
    outs: [artifacts/weights]
  build:
    foreach: [cpu-unet]
    do:
      cmd: exec python stage.py
      params: [export.opset]
      deps: [artifacts/weights]
      outs: [artifacts/engines, artifacts/bundles]
  validate:
    foreach: [cpu]
    do:
      cmd: exec python stage.py
      params: [export.opset]
      deps: [artifacts/bundles]
      outs: [artifacts/validation/cpu, artifacts/benchmark/cpu]
"""
STAGE = """\
import os, re, shutil, sys, time
from pathlib import Path
from diffusion_engines.failures import Failure, write_failure
from diffusion_engines.processes import death_with_parent
death_with_parent()()  # as every stage asks
stage = os.environ["DVC_STAGE"]
opset = re.search(r"opset: (\\d+)", Path("params.yaml").read_text())[1]
def note(what):
    with open(os.environ["TEST_RAN"], "a") as file:
        file.write(f"{what} {stage} {opset} {os.getpid()}\\n")
def fail(kind, problem):
    folder = Path(os.environ["DIFFUSION_ENGINES_FAILURES"])
    write_failure(folder, Failure(stage, "cpu", kind, problem, "less", "more"))
    sys.exit(1)
note("began")
made = Path(os.environ["TEST_MADE"])
if stage == "build@cpu-unet" and opset == os.environ.get("TEST_SLOW"):
    time.sleep(900)
if stage == "build@cpu-unet" and opset == "21":
    fail("BuildError", "the backend refused it")
for line in re.findall(r"outs: \\[(.*)\\]", Path("dvc.yaml").read_text())[
    ["download", "build@cpu-unet", "validate@cpu"].index(stage)
].split(", "):
    source = made / line if (made / line).is_dir() else made / "artifacts/reference"
    shutil.copytree(source, line)
if stage == "validate@cpu" and opset == "22":
    fail("GateError", "the unet is out of tolerance")
note("ended")
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clone]:
    """A repository with this project's conf/ and three stages, committed; the current folder."""
    clone = Clone(tmp_path / "small")
    for name in ("conf", "hydra_plugins"):
        shutil.copytree(ROOT / name, clone.path / name, ignore=shutil.ignore_patterns("__py*"))
    for name in ("models/lemon", "models/scorers", "loras", "data"):
        (clone.path / name).mkdir(parents=True)
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        target = clone.path / "models/lemon" / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / "models/lemon" / name, target)
    for name in ("models/scorers", "loras"):
        (clone.path / name / ".gitkeep").touch()
    shutil.copytree(
        ROOT / ".dvc", clone.path / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache")
    )
    shutil.copyfile(ROOT / "params.yaml", clone.path / "params.yaml")
    (clone.path / "dvc.yaml").write_text(DVC_YAML)
    (clone.path / "stage.py").write_text(STAGE)
    (clone.path / ".gitignore").write_text("/artifacts\n/data/big\n__pycache__\n")
    (clone.path / "data/small").write_text("tracked")
    made = make_fleet(tmp_path / "made", {"cpu-unet": "fp32"})
    monkeypatch.setenv("TEST_MADE", str(made.workspace.root))
    monkeypatch.setenv("TEST_RAN", str(tmp_path / "ran"))
    for variable, value in (("NAME", "t"), ("EMAIL", "t@example.invalid")):
        for who in ("AUTHOR", "COMMITTER"):
            monkeypatch.setenv(f"GIT_{who}_{variable}", value)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    clone.run("git", "init", "-q", "-b", "main")
    clone.commit()
    # Of a person at work: what is not committed belongs to the sweep.
    (clone.path / "data/small").write_text("edited")
    (clone.path / "data/big").write_text("ignored by git, and read by a stage")
    monkeypatch.chdir(clone.path)
    compose_in(clone.path)
    yield clone
    compose_in(ROOT)


def sweep(clone: Clone, *given: str, **variables: str) -> subprocess.Popen[str]:
    """Start a sweep as a person does."""
    return subprocess.Popen(
        [sys.executable, "-m", "diffusion_engines.cli", "sweep", "opset", *given],
        cwd=clone.path,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ran(clone: Clone, what: str = "ended") -> Counter[str]:
    """The stages that began or ended, with the opset of the point, and how often."""
    path = Path(os.environ["TEST_RAN"])
    lines = path.read_text().splitlines() if path.exists() else []
    return Counter(
        line.split(" ", 1)[1].rpartition(" ")[0] for line in lines if line.startswith(what)
    )


def processes_in(folder: Path) -> list[str]:
    """The command lines of what works below a folder."""
    found = []
    for process in psutil.process_iter(["cwd", "cmdline", "status"]):
        cwd, status = process.info["cwd"] or "", process.info["status"]
        if cwd.startswith(f"{folder}/.dvc") and status != psutil.STATUS_ZOMBIE:
            found.append(" ".join(process.info["cmdline"]))
    return found


def experiments(clone: Clone) -> set[str]:
    listed = clone.run("git", "for-each-ref", "--format=%(refname)", "refs/exps").output.split()
    return {ref.rpartition("/")[2] for ref in listed if "/exec/" not in ref}


def test_invalid_points_and_a_second_sweep_are_refused_before_anything_runs(
    small: Clone, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1 of 2 points of the sweep are refused"):
        main(["sweep", "opset", "export.opset=18,13"])
    with running._only_sweep(small.path):
        assert running.is_swept(small.path)
        with pytest.raises(SystemExit, match="another sweep runs in this repository"):
            main(["sweep", "opset", "export.opset=18,20"])
    assert not running.is_swept(small.path)
    assert not ran(small, "began")


def test_a_full_size_sweep_that_would_fill_the_disk_is_refused(
    fresh: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SD 1.4's weights alone take 2.1 GB in fp16; nothing of it has ever run here."""
    monkeypatch.chdir(fresh.path)
    compose_in(fresh.path)
    model = ["model=sd14-synthetic", "fleet=rtx40", "reference=short"]
    texts = [
        composed_params([*model, f"fleet.rtx40.precision={name}"], fresh.path)
        for name in ("fp16", "fp32")
    ]
    one, other = (work_of(fresh.path, text) for text in texts)
    shared = {"download", "reference", "pack@rtx40"}
    assert {s.name for s in one.stages if s.identity in other.open} >= shared
    alone, both = (space_of(works, 1, shared=False) for works in ([one], [one, other]))
    parameters = 1.06e9
    assert alone.cache > 2 * parameters + 4 * 2 * 0.98e9  # weights, then four times the graphs
    assert both.cache < 2 * alone.cache + 4 * 2 * parameters  # the weights once, the rest of each
    assert both.cache > alone.cache + 4 * 4 * 0.98e9
    # Before each point once more, what others of the sweep have made left out.
    rest = space_of([other], 0, shared=False, made=one.open)
    assert (rest.cache, rest.workspaces) == (both.cache - alone.cache, 0)
    assert both.workspaces == max(one.bytes, other.bytes)
    assert space_of([one, other], 2, shared=False).workspaces == one.bytes + other.bytes
    assert space_of([one, other], 2, shared=True).workspaces == 0

    usage = shutil.disk_usage(fresh.path)._replace(free=int(both.cache))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(HardwareError, match="the sweep precision would fill the disk") as raised:
        check_space(both, fresh.path / ".dvc/cache", fresh.path, "the sweep precision")
    text = str(raised.value)
    assert f"expected: {(both.cache + both.workspaces) / 1e9:.2f} GB free" in text
    assert "dvc gc" in text
    check_space(Space(int(both.cache), 0, 0), fresh.path, fresh.path, "a smaller one")
    command = ["sweep", "precision", *model, "fleet.rtx40.precision=fp16,fp32", "measure=[rtx40]"]
    with pytest.raises(SystemExit, match="would fill the disk"):
        main([*command, "--target", "rtx40"])
    assert not (fresh.path / ".dvc/tmp/sweep").exists()
    compose_in(ROOT)


def test_points_that_would_make_the_same_wait_for_each_other() -> None:
    def point(*identities: str) -> PointWork:
        stages = (StageWork(name, name, None, True, True) for name in identities)
        return PointWork(tuple(stages), frozenset())

    works = {"a": point("w", "1"), "b": point("w", "2"), "c": point("3")}
    assert startable(["a", "b", "c"], [], works, set()) == "a"
    assert startable(["b", "c"], ["a"], works, set()) == "c"
    assert startable(["b"], ["a", "c"], works, set()) is None
    assert startable(["b"], ["a"], works, {"w"}) == "b"


@long
def test_a_sweep_that_is_stopped_or_killed_goes_on_and_no_failing_point_stops_it(
    small: Clone, capsys: pytest.CaptureFixture[str]
) -> None:
    # All but 20 end before the interrupt: 21 cannot be built, and 22 misses a gate.
    given = ["export.opset=18,20,21,22", "--jobs", "2"]
    slow = "build@cpu-unet 20"
    run = sweep(small, *given, TEST_SLOW="20")
    gate = SWEEPS / "opset/points/opset-22.json"
    assert wait_for(lambda: ran(small, "began")[slow] == 1 and gate.exists(), 600), (
        run.communicate()[0]
    )
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=600)
    assert run.returncode == 130, output
    assert "stopped; the same command goes on" in output
    assert processes_in(small.path) == []

    run = sweep(small, *given, TEST_SLOW="20")
    assert wait_for(lambda: ran(small, "began")[slow] == 2, 600), run.communicate()[0]
    run.kill()
    run.communicate()
    assert wait_for(lambda: not processes_in(small.path), 60), processes_in(small.path)
    assert experiments(small) == {"opset-18"}
    capsys.readouterr()
    main(["experiments"])
    shown = capsys.readouterr().out
    assert re.search(r"opset-20 +without a result +`diffusion-engines sweep .*` goes on", shown)
    assert re.search(r"opset-21 +failed +build@cpu-unet: the backend refused it", shown)
    assert "Running" not in shown

    run = sweep(small, *given)
    output, _ = run.communicate(timeout=600)

    assert run.returncode == 1, output
    assert "2 to run" in output  # 21 is tried again; a missed gate is a result
    # Nothing was done twice, and what the points share once for all of them.
    once = ("download 18", "build@cpu-unet 18", "validate@cpu 18", "build@cpu-unet 22")
    assert ran(small) == Counter([*once, "build@cpu-unet 20", "validate@cpu 20"])
    assert ran(small, "began")["validate@cpu 22"] == 1
    assert experiments(small) == {"opset-18", "opset-20"}
    states = [read_point(SWEEPS / "opset", f"opset-{opset}") for opset in (20, 21, 22)]
    assert [one and one.state for one in states] == ["done", "failed", "outside"]
    assert [one and one.numbers is None for one in states] == [False, True, False]
    said = " ".join(output.split())  # a table's cells are folded
    assert "build@cpu-unet: the backend refused it: expected less, found more" in said
    assert re.search(r"opset-22 outside .* validate@cpu: the unet is out of tolerance", said)
    assert "the backend refused it" in (SWEEPS / "opset/index.html").read_text()
    assert not Path(".dvc/tmp/sweep").exists()
    # The experiment is one of DVC's: of the commit, with what was not committed.
    text = small.run("git", "show", f"{experiment(small, 'opset-20')}:data/small").output
    assert text == "edited"


def experiment(clone: Clone, name: str) -> str:
    listed = clone.run("git", "for-each-ref", "--format=%(refname)", "refs/exps").output.split()
    return next(ref for ref in listed if ref.endswith(f"/{name}"))
