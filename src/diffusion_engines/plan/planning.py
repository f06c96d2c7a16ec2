"""Plan a run: what `make repro` would do in a workspace, without doing it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from diffusion_engines.checks import check_params
from diffusion_engines.compose import composed_params
from diffusion_engines.config import params_from_config
from diffusion_engines.errors import ConfigError
from diffusion_engines.plan.estimates import Estimate, estimate
from diffusion_engines.plan.outcomes import Outcome, StagePlan, plan_stages
from diffusion_engines.plan.view import View, open_view
from diffusion_engines.tables import check_same
from diffusion_engines.why import Why
from diffusion_engines.yaml_files import PARAMS

if TYPE_CHECKING:
    from dvc.stage import PipelineStage

_WORK = (Outcome.RUNS, Outcome.MAY_RUN)


@dataclass(frozen=True)
class Plan:
    """What would become of every stage.

    Attributes:
        stages: in DVC's order, each with what it took last time.
        composes: whether params.yaml would be written anew.
    """

    stages: Sequence[tuple[StagePlan, Estimate]]
    composes: bool

    @property
    def is_idle(self) -> bool:
        """Whether nothing is to be done, but for the checks that run every time."""
        return all(s.outcome in (Outcome.CURRENT, Outcome.CHECK) for s, _ in self.stages)


def plan_run(root: Path, overrides: Sequence[str], *, pull: bool = False) -> Plan:
    """Return what `make repro`, composing with overrides, would do; params.yaml stays as it is.

    Args:
        root: of the repository.
        overrides: Hydra's.
        pull: whether the remote is asked for what the local cache lacks, as by `dvc repro --pull`.

    Raises:
        BusyError: a run works there.
        ConfigError: ``conf/`` cannot be composed, or its values do not fit together.
    """
    text, params = composed_params([*overrides], root), root / PARAMS
    composes = not params.is_file() or params.read_text() != text
    stages = _stages(root, text, asked=(), pull=pull)
    if any(s.stage == "check_conf" and s.outcome is not Outcome.CURRENT for s, _ in stages):
        check_same(yaml.safe_load(text), root)
        check_params(params_from_config(yaml.safe_load(text)), root)
    return Plan(stages, composes)


def why_stages_run(root: Path, asked: Collection[str]) -> dict[str, Why] | None:
    """Return for each stage why `dvc repro` would run it, under params.yaml as it is.

    None where all is as it would leave it: not even a check would write anything else.

    Args:
        root: of the repository.
        asked: targets to be timed anew.

    Raises:
        ConfigError: params.yaml has unknown keys or wrong types.
    """
    text = (root / PARAMS).read_text()
    planned = [plan for plan, _ in _stages(root, text, asked=asked, pull=False)]
    idle = (Outcome.CURRENT, Outcome.CHECK)
    if all(plan.outcome in idle and not plan.renews for plan in planned):
        return None
    return {
        plan.stage: Why(
            [reason.text for reason in plan.reasons],
            # Of a stage that is new, whatever comes before it.
            [] if any(reason.kind == "new" for reason in plan.reasons) else plan.upstream,
        )
        for plan in planned
        if plan.outcome in (*_WORK, Outcome.BLOCKED)
    }


def _stages(
    root: Path, text: str, *, asked: Collection[str], pull: bool
) -> list[tuple[StagePlan, Estimate]]:
    from dvc.exceptions import DvcException

    try:
        with open_view(root, text) as view:
            targets = params_from_config(view.params)["targets"]
            planned = plan_stages(view, targets, asked=asked, pull=pull)
            stages = {stage.name: stage for stage in view.repo.index.stages}
            return [(s, _estimate(view, stages[s.stage], s)) for s in planned]
    except DvcException as error:
        raise ConfigError(
            "DVC cannot read this repository", found=str(error), fix="`dvc status` says more"
        ) from error


def _estimate(view: View, stage: PipelineStage, plan: StagePlan) -> Estimate:
    if plan.outcome not in _WORK:
        return Estimate(None, None)
    return estimate(view, stage)
