"""How a point ended: numbers count where they are its own, and a missed gate is a result."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusion_engines.errors import ConfigError
from diffusion_engines.failures import Failure
from diffusion_engines.sweeps.measured import PointResult, result_of
from diffusion_engines.sweeps.points import Point
from diffusion_engines.sweeps.running import is_done
from diffusion_engines.sweeps.sweeping import sweep
from diffusion_engines.sweeps.work import PointWork, StageWork
from tests.composition import ROOT
from tests.reports import make_fleet

GATE = Failure("validate@cpu", "cpu", "GateError", "out of tolerance", "0.1", "0.2")
CRASH = Failure("build@cpu-unet", "cpu", "BuildError", "the backend refused it")
ELSEWHERE = Failure("build@rtx-unet", "rtx", "BuildError", "the backend refused it")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_fleet(tmp_path, {"cpu-unet": "fp32"}).workspace.root


def result(
    root: Path, *failures: Failure, after: tuple[str, ...] = (), ended: str = ""
) -> PointResult:
    return result_of(root, ("p", (), "k"), "cpu", failures, after, ended=ended, seconds=1.0)


def test_a_point_that_ended_well_has_its_numbers(root: Path) -> None:
    found = result(root)
    assert (found.state, found.error, found.left) == ("done", "", ())
    assert found.numbers
    assert found.numbers.latency_ms == pytest.approx(24.0)
    assert found.numbers.speedup == pytest.approx(60 / 24)
    assert found.numbers.size_mb == pytest.approx(0.0035)
    assert (found.numbers.error, found.numbers.component) == (1e-5, "unet")


def test_a_missed_gate_keeps_its_numbers(root: Path) -> None:
    found = result(root, GATE, after=("report",))
    assert found.state == "outside"
    assert found.numbers == result(root).numbers
    assert found.left == ("report", "validate@cpu")
    assert found.error == "validate@cpu: out of tolerance: expected 0.1, found 0.2"


@pytest.mark.parametrize(
    ("failures", "after", "ended"),
    [
        ([CRASH], ("wrap@cpu-unet", "validate@cpu", "benchmark@cpu"), ""),
        ([GATE, CRASH], (), ""),
        ([], (), "ended by SIGKILL"),
        ([Failure("simplify@unet-fp32", None, "GateError", "x")], ("build@cpu-unet",), ""),
    ],
    ids=["not built", "also not built", "killed", "a gate before the engine"],
)
def test_numbers_of_an_earlier_point_are_not_taken_for_its_own(
    root: Path, failures: list[Failure], after: tuple[str, ...], ended: str
) -> None:
    found = result(root, *failures, after=after, ended=ended)
    assert (found.state, found.numbers) == ("failed", None)
    assert found.error


def test_what_another_target_failed_of_leaves_the_numbers(root: Path) -> None:
    found = result(root, ELSEWHERE, after=("wrap@rtx-unet", "report"))
    assert found.state == "failed"
    assert found.numbers == result(root).numbers


def works(*runs: str) -> dict[str, PointWork]:
    stages = tuple(StageWork(name, name, 1, True, True) for name in runs)
    return {"p": PointWork(stages, frozenset())}


def test_a_point_runs_again_where_something_changed_or_it_failed(root: Path) -> None:
    point = Point("p", (), "export: {}\nconf_digest: 1\n")

    def ended(*failures: Failure, key: str = point.key) -> PointResult:
        return result_of(root, ("p", (), key), "cpu", failures, ["report"], ended="", seconds=1.0)

    assert not is_done(None, point, works())
    assert is_done(ended(), point, works())
    assert not is_done(ended(key="other"), point, works())
    assert not is_done(ended(), point, works("build@cpu-unet"))  # a library changed, say
    assert is_done(ended(GATE), point, works("validate@cpu", "report"))
    assert not is_done(ended(GATE), point, works("validate@cpu", "benchmark@cpu"))
    assert not is_done(ended(CRASH), point, works())


def test_a_name_that_is_none_of_an_experiment_is_refused() -> None:
    with pytest.raises(ConfigError, match="a sweep cannot be called 'a b'"):
        sweep(ROOT, "opset", [], name="a b")
