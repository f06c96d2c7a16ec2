"""Show a plan to a person, or to a program as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from diffusion_engines.plan.estimates import Estimate
from diffusion_engines.plan.outcomes import Outcome, StagePlan
from diffusion_engines.plan.planning import Plan
from diffusion_engines.wording import some

_FORMAT = 1
_REASONS = 4
_TITLES = {
    Outcome.RUNS: "runs",
    Outcome.MAY_RUN: "may run: not where the stages before write what is there already",
    Outcome.BLOCKED: "cannot run here",
    Outcome.RESTORED: "restored, nothing runs",
}

_TIMED = (Outcome.RUNS, Outcome.MAY_RUN)

Row = tuple[StagePlan, Estimate]


def json_from_plan(plan: Plan) -> str:
    """Return a plan as JSON, every stage in DVC's order."""
    stages = [_json_of_stage(stage, estimate) for stage, estimate in plan.stages]
    return json.dumps(
        {"format": _FORMAT, "composes_params": plan.composes, "stages": stages},
        indent=2,
        ensure_ascii=False,
    )


def _json_of_stage(stage: StagePlan, estimate: Estimate) -> dict[str, Any]:
    return {
        "stage": stage.stage,
        "outcome": str(stage.outcome),
        "remote": stage.remote,
        "reasons": [{"kind": r.kind, "what": r.what, "text": r.text} for r in stage.reasons],
        "upstream": [{"stage": u.stage, "path": u.path} for u in stage.upstream],
        "seconds": estimate.seconds,
        "bytes": estimate.bytes,
    }


def print_plan(plan: Plan, console: Console) -> None:
    """Print a plan: a table of what runs, one of what may, and the rest in a line each."""
    if plan.composes:
        console.print(
            "params.yaml is not what conf/ and these overrides give: `make repro` composes it anew,"
            " and so the plan does; `dvc repro` takes it as it is.",
            highlight=False,
        )
    for outcome, title in _TITLES.items():
        rows = [row for row in plan.stages if row[0].outcome is outcome]
        if rows:
            console.print(_table(title, rows, timed=outcome in _TIMED))
    for outcome, what in ((Outcome.CHECK, "checks, every time"), (Outcome.CURRENT, "up to date")):
        if names := [stage.stage for stage, _ in plan.stages if stage.outcome is outcome]:
            console.print(f"{what}: {len(names)} ({some(names)})", highlight=False)
    console.print(_summary(plan), highlight=False)


def _table(title: str, rows: Sequence[Row], *, timed: bool) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("stage", overflow="fold")
    table.add_column("why", overflow="fold", ratio=1)
    if timed:
        table.add_column("time", justify="right", no_wrap=True)
        table.add_column("disk", justify="right", no_wrap=True)
    for group in _groups(rows):
        names = some([stage.stage for stage, _ in group])
        numbers = [_time([e for _, e in group]), _disk([e for _, e in group])] if timed else []
        table.add_row(names, "\n".join(_why(group[0][0])), *numbers)
    return table


def _groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Put together what runs the same script for the same reasons."""
    groups: dict[tuple[str, tuple[str, ...]], list[Row]] = {}
    for row in rows:
        key = row[0].stage.partition("@")[0], tuple(_why(row[0]))
        groups.setdefault(key, []).append(row)
    yield from groups.values()


def _why(stage: StagePlan) -> list[str]:
    found = [reason.text for reason in stage.reasons]
    if len(found) > _REASONS:
        found = [*found[:_REASONS], f"and {len(found) - _REASONS} more"]
    if stage.upstream:
        found.append(f"after {some(list(dict.fromkeys(up.stage for up in stage.upstream)))}")
    if stage.remote:
        found.append("from the remote")
    return found


def _summary(plan: Plan) -> str:
    if plan.is_idle:
        return "Nothing is to be done."
    counts = {o: [e for s, e in plan.stages if s.outcome is o] for o in _TITLES}
    parts = []
    for outcome, verb in ((Outcome.RUNS, "run"), (Outcome.MAY_RUN, "may run")):
        if found := counts[outcome]:
            parts.append(f"{len(found)} {verb} ({_time(found)}, {_disk(found)})")
    if found := counts[Outcome.BLOCKED]:
        parts.append(f"{len(found)} cannot run here")
    if found := counts[Outcome.RESTORED]:
        parts.append(f"{len(found)} restored")
    return f"{', '.join(parts)}. Time and disk as of the last run."


def _time(estimates: Sequence[Estimate]) -> str:
    return _sum([e.seconds for e in estimates], _seconds)


def _disk(estimates: Sequence[Estimate]) -> str:
    return _sum([e.bytes for e in estimates], lambda value: f"{value / 1e6:.1f} MB")


def _sum(values: Sequence[float | None], text: Any) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "unknown"
    unknown = len(values) - len(known)
    return f"{text(sum(known))}{f' + {unknown} unknown' if unknown else ''}"


def _seconds(value: float) -> str:
    if value < 100:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 6000 else f"{value / 3600:.1f} h"
