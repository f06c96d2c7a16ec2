"""Whose each stage is: all targets', or one target's; and what is left to do for whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusion_engines.plan.outcomes import Outcome, StagePlan
from diffusion_engines.plan.planning import Plan

REPORT = "report"
# What reads the results of every target.
OF_RESULTS = ("choose", REPORT)
# The stages that are looped over engines, and over targets (dvc.yaml).
OF_ENGINES = ("export_program", "build", "wrap")
OF_TARGETS = ("probe", "probe_machine", "timing", "pack", "validate", "benchmark", "generate")
# Whose result is how long something takes: nothing else is to run on the machine meanwhile.
_TIMED = ("benchmark", "generate")
_TO_DO = (Outcome.RUNS, Outcome.MAY_RUN)


def target_of(stage: str, params: Mapping[str, Any]) -> str | None:
    """Return the target that a stage works for; None for one that all targets share."""
    name, _, key = stage.partition("@")
    if name in OF_ENGINES:
        return str(params["engines"][key]["target"])
    return key if name in OF_TARGETS else None


@dataclass(frozen=True)
class TargetPlan:
    """What is to be done for a target.

    Attributes:
        stages: that are its own, in DVC's order.
    """

    stages: Sequence[StagePlan]

    @property
    def names(self) -> list[str]:
        """Of its stages."""
        return [stage.stage for stage in self.stages]

    @property
    def build(self) -> list[str]:
        """What is to be reproduced beside others."""
        return [name for name in self.names if not _is_timed(name)]

    @property
    def measure(self) -> list[str]:
        """What is to be reproduced alone."""
        return [name for name in self.names if _is_timed(name)]

    @property
    def to_do(self) -> bool:
        """Whether a stage runs, as far as is known here."""
        return any(stage.outcome in _TO_DO for stage in self.stages)

    @property
    def to_do_here(self) -> bool:
        """Whether this machine makes more for it than what needs no engine (``pack``)."""
        to_do = [s.stage.partition("@")[0] for s in self.stages if s.outcome in _TO_DO]
        return bool(set(to_do) - {"pack"} if self.blocked else to_do)

    @property
    def restored(self) -> bool:
        """Whether a stage comes from a cache."""
        return any(stage.outcome is Outcome.RESTORED for stage in self.stages)

    @property
    def blocked(self) -> str:
        """Why a stage cannot run here; nothing where all can."""
        found = [stage for stage in self.stages if stage.outcome is Outcome.BLOCKED]
        here = [r.text for s in found for r in s.reasons if r.kind == "here"]
        other = [r.text for s in found for r in s.reasons]
        return (here or other or [""])[0]


@dataclass(frozen=True)
class FleetPlan:
    """What is to be done for all targets together, for each, and at the end.

    Attributes:
        shared: the stages that all share, and that do something.
        targets: by name.
        results: the stages that read every target's results, in DVC's order.
        renews: whether one of those does something.
    """

    shared: Sequence[str]
    targets: Mapping[str, TargetPlan]
    results: Sequence[str]
    renews: bool


def fleet_plan(plan: Plan, params: Mapping[str, Any]) -> FleetPlan:
    """Return a plan by whose the stages are."""
    shared, results, idle = [], [], True
    targets: dict[str, list[StagePlan]] = {target: [] for target in params["targets"]}
    for stage, _ in plan.stages:
        if stage.stage.partition("@")[0] in OF_RESULTS:
            results.append(stage.stage)
            idle = idle and stage.outcome is Outcome.CURRENT
        elif (target := target_of(stage.stage, params)) is not None:
            targets[target].append(stage)
        elif stage.outcome is not Outcome.CURRENT:
            shared.append(stage.stage)
    own = {name: TargetPlan(stages) for name, stages in targets.items()}
    return FleetPlan(shared, own, results, not idle)


def _is_timed(stage: str) -> bool:
    return stage.partition("@")[0] in _TIMED
