"""A point is written into conf/ as a person would write it, and conf/ then composes to it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffusion_engines.compose import composed_params
from diffusion_engines.errors import ConfigError
from diffusion_engines.sweeps import picking
from diffusion_engines.sweeps.measured import SWEEPS, SweepRecord, write_point, write_sweep
from diffusion_engines.sweeps.picking import pick_revision, pick_rule
from diffusion_engines.sweeps.points import compose_sweep
from tests.composition import ROOT
from tests.tiers import long, long_but
from tests.unit.sweeps.test_fronts import point

POINTS = {
    "opset": (["export.opset=20"], ["conf/export/dynamo.yaml"]),
    "precision": (["fleet.cpu.precision=fp16"], ["conf/fleet/default.yaml"]),
    "component": (["fleet.cpu.components.unet=fp16"], ["conf/fleet/default.yaml"]),
    "level": (["targets.cpu.build.optimization_level=basic"], ["conf/fleet/default.yaml"]),
    "backend": (["target@targets.cpu=cpu_inductor"], ["conf/fleet/default.yaml"]),
    "exporter": (
        ["export=torchscript", "export.opset=16"],
        ["conf/config.yaml", "conf/export/torchscript.yaml"],
    ),
    "steps": (
        ["reference.steps=5", "benchmark.steps=${reference.steps}"],
        ["conf/benchmark/default.yaml", "conf/reference/default.yaml"],
    ),
    "model": (["model=tiny", "image.batch_size=2"], ["conf/config.yaml", "conf/model/tiny.yaml"]),
}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository's configuration, to change."""
    for name in ("conf", "hydra_plugins"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__py*"))
    for name in ("models", "loras"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    return tmp_path


def record(root: Path, overrides: list[str]) -> SweepRecord:
    """A sweep whose point ``one`` has these overrides, and is the fastest."""
    points = tuple((name, tuple(given), name) for name, given in (("one", overrides), ("two", [])))
    made = SweepRecord("mine", "cpu", points, "diffusion-engines sweep mine")
    write_sweep(made, root / SWEEPS / "mine")
    for name, ms in (("one", 10.0), ("two", 20.0)):
        write_point(point(name, ms, 1e-3, 5.0)[0], root / SWEEPS / "mine")
    return made


def composed(root: Path, *overrides: str) -> dict[str, Any]:
    found = yaml.safe_load(composed_params([*overrides], root))
    assert found.pop("conf_digest")
    return found


@pytest.mark.parametrize("name", long_but(["precision", "backend", "steps"], POINTS))
def test_conf_composes_to_the_picked_point(root: Path, name: str) -> None:
    overrides, files = POINTS[name]
    record(root, overrides)
    wanted, before = composed(root, *overrides), composed(root)
    comments = comments_in(root)

    picked = pick_rule(root, "fastest", None)

    assert picked.name == "one"
    assert sorted(map(str, picked.files)) == files
    written = yaml.safe_load((root / "params.yaml").read_text())
    assert wanted != before
    assert {**written, "conf_digest": ""} == {**wanted, "conf_digest": ""}
    assert comments_in(root) == comments
    assert picked.changes


def comments_in(root: Path) -> list[str]:
    """Every comment below conf/."""
    texts = (path.read_text() for path in sorted((root / "conf").rglob("*.yaml")))
    return [line.partition("#")[2] for text in texts for line in text.splitlines() if "#" in line]


def test_what_cannot_be_written_changes_nothing(root: Path) -> None:
    record(root, ["model=sdxl-turbo", "reference.steps=2"])  # the model chooses its reference
    before = {path: path.read_bytes() for path in root.rglob("*.yaml")}
    with pytest.raises(
        ConfigError, match="would not compose to one, and stays as it was"
    ) as raised:
        pick_rule(root, "fastest", None)
    assert "reference.steps: 4 → 2" in str(raised.value)
    assert {path: path.read_bytes() for path in root.rglob("*.yaml")} == before


@pytest.mark.parametrize(
    ("rule", "sweep", "message"),
    [("cheapest", None, "there is no rule cheapest"), ("knee", "other", "there is no sweep other")],
)
def test_what_does_not_exist_is_named(
    root: Path, rule: str, sweep: str | None, message: str
) -> None:
    record(root, ["export.opset=20"])
    with pytest.raises(ConfigError, match=message):
        pick_rule(root, rule, sweep)


def test_without_a_point_within_the_gates_nothing_is_picked(root: Path) -> None:
    record(root, ["export.opset=20"])
    for name in ("one", "two"):
        write_point(point(name, 1.0, 1.0, 1.0, "outside")[0], root / SWEEPS / "mine")
    with pytest.raises(ConfigError, match="no point of the sweep mine is within the gates"):
        pick_rule(root, "knee", None)


@long
def test_a_revision_and_the_name_of_a_point_are_written_too(root: Path) -> None:
    wanted = composed(root, "export.opset=21", "fleet.rtx.precision=bf16")
    params = root / "params.yaml"
    kept = params.read_text()
    params.write_text(composed_params(["export.opset=21", "fleet.rtx.precision=bf16"], root))
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    for command in (["init", "-q"], ["add", "params.yaml"], ["commit", "-qm", "one"]):
        subprocess.run(["git", *identity, *command], cwd=root, check=True)
    params.write_text(kept)
    pick_revision(root, "HEAD")
    assert composed(root) == wanted
    assert pick_revision(root, "HEAD").files == ()  # it says so already
    record(root, ["export.opset=18", "fleet.rtx.precision=fp16"])
    pick_revision(root, "one")
    assert {**composed(root), "conf_digest": ""} == {**yaml.safe_load(kept), "conf_digest": ""}
    with pytest.raises(ConfigError, match="there is no revision or experiment nope"):
        pick_revision(root, "nope")


@long
def test_a_pick_is_what_the_sweep_composed(root: Path) -> None:
    """The overrides of a ready sweep's point, through the same functions."""
    found = compose_sweep(root, "opset", ["export.opset=20,21"], file="opset")
    points = tuple((one.name, one.overrides, one.key) for one in found.points)
    write_sweep(SweepRecord("opset", "cpu", points, "…"), root / SWEEPS / "opset")
    assert pick_revision(root, "opset-21").changes[0].after == 21
    assert composed(root)["export"]["opset"] == 21


def test_a_prompt_of_a_revision_is_written_as_it_is(root: Path) -> None:
    """No grammar of overrides in between, where commas and quotes mean something."""
    prompt = "a bowl: red, 'green' and {blue}"
    wanted = yaml.safe_load((root / "params.yaml").read_text())
    wanted["benchmark"]["prompt"] = prompt
    values = [("benchmark.prompt", prompt)]
    picked = picking._write(root, "mine", "as it was named", values, wanted)
    assert picked.files == (Path("conf/benchmark/default.yaml"),)
    assert composed(root)["benchmark"]["prompt"] == prompt
    with pytest.raises(ConfigError, match=r"steps\.x has no place in conf/benchmark"):
        picking._write(root, "mine", "", [("benchmark.steps.x", 1)], wanted)
