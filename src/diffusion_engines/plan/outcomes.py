"""What `dvc repro` would do with each stage, in its order, as far as that is known beforehand.

DVC runs a stage, restores it or leaves it alone by what lies in the workspace when its turn comes.
So this walks the graph as DVC does, and keeps what each stage will have left there: what a cache
has is known, what has to be made is not. A stage that depends on such a path may run, or not run,
where what was made is equal, byte for byte, to what was there.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_engines.backends.base import Target
from diffusion_engines.errors import DiffusionEnginesError, HardwareError
from diffusion_engines.files import text_from_json
from diffusion_engines.params import Difference, differences
from diffusion_engines.plan import checks, reasons
from diffusion_engines.plan.contents import Contents, Listing, Written, hash_of_bytes, listing
from diffusion_engines.plan.entries import Entry, Store, Wanted
from diffusion_engines.plan.history import committed, listing_of
from diffusion_engines.plan.reasons import Reason
from diffusion_engines.plan.view import View
from diffusion_engines.why import Upstream

if TYPE_CHECKING:
    from dvc.stage import PipelineStage

# Whose stages make an engine's files, on hardware that the target asks for.
_BUILDING = ("export_program", "build")
_RECORDS = ("artifacts/fingerprints/", "artifacts/machines/")


class Outcome(StrEnum):
    """What becomes of a stage."""

    RUNS = "runs"
    MAY_RUN = "may run"
    RESTORED = "restored"
    BLOCKED = "blocked"
    CHECK = "check"
    CURRENT = "current"


@dataclass(frozen=True)
class StagePlan:
    """What becomes of one stage, and why.

    Attributes:
        stage: as DVC calls it, such as ``build@rtx-unet``.
        outcome: what becomes of it.
        reasons: what changed.
        upstream: what may have changed when its turn comes.
        remote: of a restored one, whether the remote has what the local cache lacks.
        renews: of a check, whether it would write what is not there, or be recorded anew.
    """

    stage: str
    outcome: Outcome
    reasons: tuple[Reason, ...] = ()
    upstream: tuple[Upstream, ...] = ()
    remote: bool = False
    renews: bool = False


def plan_stages(
    view: View, targets: Mapping[str, Target], *, asked: Collection[str] = (), pull: bool = False
) -> list[StagePlan]:
    """Return what `dvc repro` would do with every stage, in its order.

    Args:
        view: of the workspace.
        targets: of the view's parameters, typed.
        asked: targets to be timed anew.
        pull: whether it is `dvc repro --pull`.
    """
    return _Planner(view, targets, asked, Store(view.repo, pull)).plan()


@dataclass
class _Planner:
    view: View
    targets: Mapping[str, Target]
    asked: Collection[str]
    store: Store
    blocked: set[str] = field(default_factory=set)
    values: dict[str, Any] = field(default_factory=dict)
    obstacles: dict[str, HardwareError | None] = field(default_factory=dict)

    def plan(self) -> list[StagePlan]:
        from dvc.repo.reproduce import get_active_graph, plan_repro

        graph = get_active_graph(self.view.repo.index.graph)
        planned = []
        for stage in plan_repro(graph):
            before = [other.name for other in graph.successors(stage)]
            found = self._blocked(stage, before) or self._planned(stage)
            if found.outcome is Outcome.BLOCKED:
                self.blocked.add(stage.name)
            planned.append(found)
        return planned

    @cached_property
    def contents(self) -> Contents:
        return Contents(self.view.repo)

    @cached_property
    def locked_outs(self) -> dict[str, str]:
        """The hash in dvc.lock of every output, by its path."""
        stages = self.view.repo.index.stages
        return {
            out.def_path: out.hash_info.value
            for stage in stages
            for out in stage.outs
            if out.hash_info
        }

    def _blocked(self, stage: PipelineStage, before: Collection[str]) -> StagePlan | None:
        if failing := sorted(self.blocked.intersection(before)):
            text = f"it needs {failing[0]}, which cannot be made"
            return self._is_blocked(stage, Reason("stage", failing[0], text))
        return None

    def _is_blocked(self, stage: PipelineStage, reason: Reason) -> StagePlan:
        self._write_unknown(stage)
        return StagePlan(stage.name, Outcome.BLOCKED, (reason,))

    def _write_unknown(self, stage: PipelineStage) -> None:
        for out in stage.outs:
            self.contents.write(out.def_path, Written(stage.name, None))

    def _planned(self, stage: PipelineStage) -> StagePlan:
        try:
            writes = checks.written_by(stage.name, self.view.root, self.targets, self.asked)
        except DiffusionEnginesError as error:
            return self._is_blocked(stage, Reason("here", stage.name, _short(error)))
        if stage.always_changed:
            renews = self._renews(stage, writes)
            if writes:
                self._write_values(stage, writes)
            else:
                self._write_unknown(stage)
            return StagePlan(stage.name, Outcome.CHECK, renews=renews)
        if lacking := self._lacks_file(stage):
            return self._is_blocked(stage, lacking)
        found = self._decided(stage)
        if found.outcome is Outcome.RUNS and (lacking := self._lacks_hardware(stage)):
            return self._is_blocked(stage, lacking)
        if found.outcome in (Outcome.RUNS, Outcome.MAY_RUN):
            self._write_unknown(stage)
            if writes:
                self._write_values(stage, writes)
        return found

    def _renews(self, stage: PipelineStage, writes: checks.Writes | None) -> bool:
        """Whether a check's outputs are not as it would leave them, or its record in dvc.lock."""
        if writes is None or not all(out.hash_info for out in stage.outs):
            return True
        here = {path: self.contents.hash(path) for path in writes.values}
        return bool(self._changed_inputs(stage)) or any(
            here[path] is None or (value is not None and here[path] != checks.hash_of_json(value))
            for path, value in writes.values.items()
        )

    def _write_values(self, stage: PipelineStage, writes: checks.Writes) -> None:
        for path, value in writes.values.items():
            if value is not None:
                self.contents.write(path, Written(stage.name, checks.hash_of_json(value)))
                self.values[path] = value

    def _lacks_file(self, stage: PipelineStage) -> Reason | None:
        for path in self._paths(stage):
            if not self.contents.unknown(path) and self.contents.hash(path) is None:
                return Reason("file", path, f"{path} does not exist, and no stage makes it")
        return None

    def _lacks_hardware(self, stage: PipelineStage) -> Reason | None:
        name, _, key = stage.name.partition("@")
        if name in _BUILDING:
            target = self.view.params["engines"][key]["target"]
            if target not in self.obstacles:
                self.obstacles[target] = checks.cannot_build(self.targets[target])
            if error := self.obstacles[target]:
                return Reason("here", target, _short(error))
        return None

    def _decided(self, stage: PipelineStage) -> StagePlan:
        """Do as `Stage.changed` and `StageCache.restore` of DVC do."""
        upstream = self._upstream(stage)
        if any(out.hash_info for out in stage.outs):
            changed, lacking = self._changed_inputs(stage), self._changed_outs(stage)
        else:
            changed, lacking = [Reason("new", stage.name, "dvc.lock has no such stage yet")], []
        if not changed and not lacking and not upstream:
            return StagePlan(stage.name, Outcome.CURRENT)
        entries = self._entries(stage, unchanged=not changed, known=not upstream)
        why = (*changed, *lacking)
        if upstream:
            # Something that was cached could fit whatever the stages before make.
            sure = bool(why) and not entries
            return StagePlan(stage.name, Outcome.RUNS if sure else Outcome.MAY_RUN, why, upstream)
        if not entries:
            return StagePlan(stage.name, Outcome.RUNS, why)
        remote = self._restore(stage, entries[0])
        return StagePlan(stage.name, Outcome.RESTORED, why, remote=remote)

    def _restore(self, stage: PipelineStage, entry: Entry) -> bool:
        """Say what a stage leaves that is restored; return whether the remote is asked for any."""
        holders = {out["path"]: self.store.holder(out["md5"]) for out in entry["outs"]}
        for out in entry["outs"]:
            path = out["path"]
            self.contents.write(path, Written(stage.name, out["md5"], holders[path]))
        return any(map(self.store.is_remote, holders.values()))

    def _entries(self, stage: PipelineStage, *, unchanged: bool, known: bool) -> list[Entry]:
        """Return what the stage could be restored from, all of which some store has."""
        if any(out.persist for out in stage.outs):
            return []
        found: list[Entry] = []
        if unchanged and all(out.hash_info for out in stage.outs):
            outs = [{"path": o.def_path, "md5": o.hash_info.value} for o in stage.outs]
            found.append({"outs": outs})
        if not (unchanged and known):
            found += self.store.newest(self._wanted(stage))
        return [e for e in found if all(self.store.holder(o["md5"]) for o in e["outs"])]

    def _wanted(self, stage: PipelineStage) -> Wanted:
        deps = {
            path: None if self.contents.unknown(path) else self.contents.hash(path)
            for path in self._paths(stage)
        }
        params = {key: self._param(key) for dep in stage.params for key in self._keys(dep)}
        return Wanted(stage.cmd, deps, params, frozenset(out.def_path for out in stage.outs))

    def _paths(self, stage: PipelineStage) -> list[str]:
        """The files and folders that a stage depends on."""
        return [dep.def_path for dep in stage.deps if dep not in stage.params]

    def _keys(self, dep: Any) -> list[str]:
        return list(dep.params or self.view.params)

    def _param(self, key: str) -> Any:
        value: Any = self.view.params
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def _upstream(self, stage: PipelineStage) -> tuple[Upstream, ...]:
        found = dict.fromkeys(
            output for path in self._paths(stage) for output in self.contents.unknown(path)
        )
        return tuple(Upstream(name, out, self.locked_outs.get(out)) for name, out in found)

    def _changed_inputs(self, stage: PipelineStage) -> list[Reason]:
        changed = []
        if stage.changed_stage():
            changed.append(Reason("command", stage.name, "its command in dvc.yaml changed"))
        for dep in stage.deps:
            if dep in stage.params:
                changed += self._changed_params(dep)
                continue
            path, before = dep.def_path, dep.hash_info.value
            if not self.contents.unknown(path) and self.contents.hash(path) != before:
                changed += self._changed_path(path, before)
        return changed

    def _changed_params(self, dep: Any) -> list[Reason]:
        before = dep.hash_info.value or {}
        keys = dict.fromkeys([*self._keys(dep), *([] if dep.params else before)])
        return [
            reasons.of_value("param", change.key, change.before, change.after)
            for key in keys
            if before.get(key) != (after := self._param(key))
            # A key that is there and null differs, for DVC, from one that is not there.
            for change in differences(key, before.get(key), after)
            or [Difference(key, before.get(key), after)]
        ]

    def _changed_path(self, path: str, before: str | None) -> list[Reason]:
        if before is None:
            return [Reason("file", path, f"{path} is a new dependency")]
        if path.startswith(_RECORDS):
            return self._changed_record(path, before)
        old = self._listing_before(path, before)
        changes = reasons.changes_between(old, self.contents.files(path)) if old else []
        return [reasons.of_files(path, changes)]

    def _listing_before(self, path: str, before: str) -> Listing | None:
        if (stored := listing(before, self.view.repo.cache.local)) is not None:
            return stored
        files = committed(self.view.root, path, before)
        return listing_of(files) if files is not None else None

    def _changed_record(self, path: str, before: str) -> list[Reason]:
        """Return which fields changed of a record: of a fingerprint, or of a machine."""
        kind: reasons.Kind = "fingerprint" if path.startswith(_RECORDS[0]) else "machine"
        name, file = Path(path).stem, self.view.root / path
        here = file.read_bytes() if file.is_file() else b"{}"
        new = self.values.get(path, json.loads(here))
        if new == checks.NEW:
            return [Reason(kind, path, f"{name} is timed anew, on this machine")]
        if hash_of_bytes(here) != before:
            here = (committed(self.view.root, path, before) or {}).get("", b"null")
        changes = differences("", json.loads(here), json.loads(text_from_json(new)))
        if not changes or changes[0].key == "":  # what it was is nowhere any more
            return [Reason(kind, path, f"{path} changed")]
        return [
            reasons.of_value(kind, f"{kind} {name}, {c.key[1:]}", c.before, c.after)
            for c in changes
        ]

    def _changed_outs(self, stage: PipelineStage) -> list[Reason]:
        found = []
        for out in stage.outs:
            path, value = out.def_path, out.hash_info.value
            if value is None:
                found.append(Reason("output", path, f"{path} is a new output"))
                continue
            here = self.contents.hash_now(path)
            if here is None:
                found.append(Reason("output", path, f"{path} is missing"))
            elif here != value:
                old = listing(value, self.view.repo.cache.local) or {}
                changes = reasons.changes_between(old, self.contents.files_now(path))
                text = f": {', '.join(changes)}" if changes else ""
                found.append(Reason("output", path, f"{path} was edited{text}"))
            elif self.store.holder(value) is not self.view.repo.cache.local:
                found.append(Reason("cache", path, f"the cache has lost {path}"))
        return found


def _short(error: DiffusionEnginesError) -> str:
    expected = f" (expected {error.expected}, found {error.found})" if error.expected else ""
    return f"{error.problem}{expected}".replace("\n", " ")
