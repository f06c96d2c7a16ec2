"""Measurements belong to the target that they were made for, on whichever machine DVC runs next.

The GPU here is the toy backend's, which tests can give and take away (tests/toys/).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.conftest import Clone
from tests.pipeline.machines import Machine
from tests.tiers import full, long
from tests.toys import add_backend

pytestmark = pytest.mark.pipeline

PROBES = {*("probe@cpu", "probe@rtx", "probe@toy"), *("probe_machine@cpu", "probe_machine@toy")}
WITH_GPU = {"TOY_GPU": "alpha"}
MEASURE = "DIFFUSION_ENGINES_MEASURE"


@pytest.fixture(scope="module")
def shared(finished: Clone, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone with the GPU, in which both targets are measured and pushed; not to change."""
    folder = tmp_path_factory.mktemp("shared")
    clone = finished.copy(folder / "clone")
    add_backend(clone)
    clone.add_target("toy", "toy", "fp32", measured=True)
    clone.run("dvc", "remote", "add", "-d", "shared", str(folder / "remote"))
    outcome = clone.repro(env=WITH_GPU)
    assert {"build@toy-unet", "benchmark@toy"} <= outcome.built
    clone.commit("measured")
    clone.run("dvc", "push")
    return clone


@pytest.fixture
def second(shared: Clone, tmp_path: Path) -> Clone:
    """A clone as another person has it after `git clone`."""
    clone = Clone(tmp_path / "second")
    shared.run("git", "clone", "-q", ".", str(clone.path))
    return clone


def record(clone: Clone, target: str) -> dict[str, Any]:
    return json.loads((clone.path / f"artifacts/machines/{target}.json").read_text())


def machine_of_result(clone: Clone, target: str) -> dict[str, Any]:
    path = clone.path / f"artifacts/benchmark/{target}/benchmark.json"
    return json.loads(path.read_text())["machine"]


@pytest.mark.parametrize(
    ("machine", "variables"),
    [
        pytest.param(Machine(), WITH_GPU, id="the same", marks=full),
        pytest.param(Machine(cores=1), WITH_GPU, id="other core count", marks=full),
        pytest.param(Machine('name="another CPU"'), WITH_GPU, id="other CPU name", marks=full),
        pytest.param(Machine(), {}, id="no GPU", marks=long),
        pytest.param(Machine(), {"TOY_GPU": "beta"}, id="other GPU model"),
        pytest.param(Machine('name="another CPU"', cores=1), {}, id="a laptop", marks=long),
    ],
)
def test_a_second_machine_restores_everything_measurements_too(
    second: Clone, tmp_path: Path, machine: Machine, variables: dict[str, str]
) -> None:
    outcome = second.repro("--pull", env=machine.env(tmp_path) | variables)

    assert outcome.ran == PROBES
    assert (second.path / "artifacts/benchmark/toy/benchmark.json").is_file()
    assert (second.path / "artifacts/report/index.html").is_file()
    assert not second.run("git", "status", "--porcelain").output.strip()


@long
def test_a_result_is_not_filed_under_another_machine(second: Clone, tmp_path: Path) -> None:
    env = Machine('name="another CPU"').env(tmp_path) | WITH_GPU | {"TOY_VERSION": "2"}
    second.run("dvc", "pull")

    outcome = second.repro(check=False, env=env)

    # The hardware fits and its library is another: the engine is built and validated here.
    assert outcome.status != 0
    assert {"build@toy-unet", "wrap@toy-unet"} <= outcome.built
    assert not {"validate@cpu", "benchmark@cpu", "generate@cpu"} & outcome.built
    assert "toy was timed on another machine" in outcome.output
    assert "found:    cpu another CPU" in outcome.output
    assert "make measure TARGET=toy" in outcome.output
    assert record(second, "toy")["machine"]["cpu"] != "another CPU"

    asked = second.repro(env=env | {MEASURE: "toy"})

    assert {"benchmark@toy", "generate@toy", "report"} <= asked.built
    assert record(second, "toy")["machine"]["cpu"] == "another CPU"
    assert machine_of_result(second, "toy")["cpu"] == "another CPU"
    assert not {"validate@cpu", "benchmark@cpu", "generate@cpu"} & asked.built


@full
def test_measuring_the_same_machine_again_measures(shared: Clone, tmp_path: Path) -> None:
    clone = shared.copy(tmp_path / "again")
    before = record(clone, "toy")

    outcome = clone.repro(env=WITH_GPU | {MEASURE: "toy"})

    assert outcome.ran - PROBES == {"benchmark@toy", "generate@toy", "report"}
    assert record(clone, "toy")["machine"] == before["machine"]
    assert record(clone, "toy")["time"] > before["time"]


def test_a_machine_without_the_hardware_cannot_be_asked(shared: Clone, tmp_path: Path) -> None:
    clone = shared.copy(tmp_path / "asked")

    outcome = clone.repro("probe_machine@toy", check=False, env={MEASURE: "toy"})

    assert outcome.status != 0
    assert "the target toy cannot be timed on this machine" in outcome.output
    assert "expected: alpha" in outcome.output
    assert not clone.run("git", "status", "--porcelain").output.strip()


@long
def test_two_machines_measure_and_merge(shared: Clone, tmp_path: Path) -> None:
    """The commands of docs/sharing.md, word for word."""
    origin = tmp_path / "origin.git"
    shared.run("git", "clone", "-q", "--bare", ".", str(origin))
    laptop, server = Clone(tmp_path / "laptop"), Clone(tmp_path / "server")
    for clone in (laptop, server):
        shared.run("git", "clone", "-q", str(origin), str(clone.path))
        clone.run("dvc", "pull")
    (tmp_path / "a").mkdir()
    on_laptop = Machine('name="the laptop"').env(tmp_path / "a")
    on_server = Machine('name="the server"').env(tmp_path / "a") | WITH_GPU
    laptop.repro(env=on_laptop | {MEASURE: "cpu"})
    server.repro(env=on_server | {MEASURE: "toy"})
    for clone in (laptop, server):
        clone.run("dvc", "push")
        clone.commit("measured")
    laptop.run("git", "push", "-q")

    merge = server.run("git", "pull", "--no-rebase", check=False)
    assert "CONFLICT (content): Merge conflict in dvc.lock" in merge.output
    resolved = server.run("diffusion-engines", "merge-lock")
    assert "report" in resolved.output
    server.run("git", "commit", "--no-edit", "-q")
    outcome = server.repro("--pull", env=on_server)

    assert outcome.ran - PROBES == {"report"}
    page = (server.path / "artifacts/report/index.html").read_text()
    assert "the laptop" in page
    assert "the server" in page
    server.commit("report")
    server.run("dvc", "push")
    server.run("git", "push", "-q")
    laptop.run("git", "pull", "-q")
    assert laptop.repro("--pull", env=on_laptop).ran == PROBES
    assert not laptop.run("git", "status", "--porcelain").output.strip()
