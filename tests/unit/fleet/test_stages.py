"""Each stage is one target's or all targets', and a plan is divided so."""

from __future__ import annotations

import pytest
import yaml

from diffusion_engines.fleet.stages import (
    OF_ENGINES,
    OF_RESULTS,
    OF_TARGETS,
    TargetPlan,
    target_of,
)
from diffusion_engines.plan.outcomes import Outcome, StagePlan
from diffusion_engines.plan.reasons import Reason
from tests.conftest import ROOT

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
OF_GRAPHS = {"export", "simplify", "quantize"}


def test_every_looped_stage_is_of_a_target_or_of_a_graph() -> None:
    looped = {name for name, stage in STAGES.items() if "foreach" in stage}
    assert looped | {"report"} == {*OF_ENGINES, *OF_TARGETS, *OF_RESULTS, *OF_GRAPHS}


@pytest.mark.parametrize(
    ("stage", "target"),
    [
        ("build@rtx-vae_decoder", "rtx"),
        ("wrap@cpu-unet", "cpu"),
        ("probe@rtx", "rtx"),
        ("benchmark@cpu", "cpu"),
        ("export@unet-fp16", None),
        ("download", None),
        ("choose@cpu", None),
        ("report", None),
    ],
)
def test_whose_a_stage_is(stage: str, target: str | None) -> None:
    assert target_of(stage, PARAMS) == target


def test_where_engines_are_blocked_what_needs_none_is_no_work_of_its_own() -> None:
    here = (Reason("here", "a10", "no A10"),)
    blocked = StagePlan("build@a10-unet", Outcome.BLOCKED, here)
    pack = StagePlan("pack@a10", Outcome.RUNS)
    wrap = StagePlan("wrap@a10-unet", Outcome.RUNS)
    assert not TargetPlan([blocked, pack]).to_do_here
    assert TargetPlan([blocked, pack]).to_do
    assert TargetPlan([blocked, pack]).blocked == "no A10"
    assert TargetPlan([blocked, wrap]).to_do_here
    assert TargetPlan([pack]).to_do_here


def test_what_is_timed_is_apart() -> None:
    names = ("build@cpu-unet", "validate@cpu", "benchmark@cpu", "generate@cpu")
    plan = TargetPlan([StagePlan(name, Outcome.RUNS) for name in names])
    assert plan.build == ["build@cpu-unet", "validate@cpu"]
    assert plan.measure == ["benchmark@cpu", "generate@cpu"]
