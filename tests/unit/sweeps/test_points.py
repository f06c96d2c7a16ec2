"""The points of a sweep: what is composed of a file and overrides, and what is refused."""

from __future__ import annotations

import re

import pytest
import yaml

from diffusion_engines.errors import ConfigError
from diffusion_engines.sweeps.points import FOLDER, Sweep, compose_sweep
from tests.composition import ROOT
from tests.tiers import long_but

READY = sorted(path.stem for path in (ROOT / FOLDER).glob("*.yaml"))


def sweep(file: str, *given: str, target: str | None = None, name: str = "s") -> Sweep:
    return compose_sweep(ROOT, name, given, file=file, target=target)


def values(found: Sweep, key: str) -> list[object]:
    """What a key is composed to in each point."""
    result = []
    for point in found.points:
        value = yaml.safe_load(point.params)
        for part in key.split("."):
            value = value[part]
        result.append(value)
    return result


def test_there_are_the_sweeps_that_people_ask_for() -> None:
    assert {"opset", "precision", "backend", "optimization_level", "steps"} <= set(READY)


@pytest.mark.parametrize("file", long_but(["precision"], READY))
def test_a_ready_sweep_fits_the_default_fleet_and_says_its_command(file: str) -> None:
    found = sweep(file, name=file)
    assert len({point.key for point in found.points}) == len(found.points) > 1
    assert len({point.name for point in found.points}) == len(found.points)
    assert found.target == "cpu"
    first = (ROOT / FOLDER / f"{file}.yaml").read_text().splitlines()[0]
    assert f"`make sweep SWEEP={file}`" in first


def test_an_override_takes_the_place_of_the_files_and_may_sweep() -> None:
    found = sweep("opset", "export.opset=18,20", "benchmark.repeats=3,5", "export=dynamo")
    assert values(found, "export.opset") == [18, 18, 20, 20]
    assert values(found, "benchmark.repeats") == [3, 5, 3, 5]
    assert [point.name for point in found.points] == ["s-18-3", "s-18-5", "s-20-3", "s-20-5"]


def test_what_is_not_a_list_is_composed_by_hydra() -> None:
    found = sweep("steps", "reference.steps=5,10")
    assert values(found, "benchmark.steps") == values(found, "generate.steps") == [5, 10]


def test_the_swept_target_is_that_of_the_fleet() -> None:
    given = ["fleet=inductor_cpu", "measure=[cpu_inductor]", "fleet.cpu_inductor.precision=fp32"]
    found = sweep("precision", *given)
    assert found.target == "cpu_inductor"
    assert [point.name for point in found.points] == ["s"]


def test_a_choice_of_a_group_may_be_swept_over() -> None:
    assert values(sweep("backend"), "targets.cpu.backend") == ["onnxruntime", "inductor"]


def test_every_point_that_cannot_be_built_is_named_and_none_is_run() -> None:
    with pytest.raises(ConfigError) as raised:
        sweep("opset", "export.opset=13,18,25", "fleet.cpu.precision=fp32,fp17")
    text = str(raised.value)
    assert "5 of 6 points of the sweep are refused, and nothing was run" in text
    assert re.search(r"export\.opset=13 .*: .*lacks opset 13", text.replace("\n", " "))
    assert text.count("fp17") >= 3


@pytest.mark.parametrize(
    ("file", "given", "target", "message"),
    [
        ("nope", [], None, "there is no sweep nope"),
        ("opset", ["export.opset=[1"], None, "an override is not in Hydra's grammar"),
        ("precision", [], "rtx", "rtx is not measured"),
        ("precision", ["measure=[]"], None, "a sweep compares what one target measures"),
    ],
)
def test_what_does_not_exist_is_refused(
    file: str, given: list[str], target: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(file, *given, target=target)


def test_equal_parameters_are_one_point_whichever_files_say_them() -> None:
    (one,) = sweep("opset", "export.opset=18").points
    other = type(one)("other", (), one.params.replace("conf_digest: ", "conf_digest: x"))
    assert one.key == other.key
    assert one.key != type(one)("a", (), one.params.replace("opset: 18", "opset: 20")).key
