"""What each point of a sweep would run, and the space that all of them need, before any runs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_engines.config import params_from_config
from diffusion_engines.errors import HardwareError
from diffusion_engines.plan.estimates import estimate
from diffusion_engines.plan.outcomes import Outcome, plan_stages
from diffusion_engines.plan.view import View, open_view
from diffusion_engines.precisions import PRECISIONS

if TYPE_CHECKING:
    from dvc.stage import PipelineStage

_WORK = (Outcome.RUNS, Outcome.MAY_RUN)
# It depends on all parameters, and what it writes is a constant: what comes after it does not
# differ with it.
_CONSTANT = "check_conf"
# Synthetic weights are stored as asked for, all others as they come: in fp32 at most.
_HALF = ("synthetic", "fp16")
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}


@dataclass(frozen=True)
class StageWork:
    """One stage under the parameters of a point.

    Attributes:
        name: as DVC calls it.
        identity: equal where it is the same work in another point.
        bytes: that its outputs have; None where nobody knows.
        is_open: whether it has to run, or may.
        runs: whether it has to, and its result can be kept.
    """

    name: str
    identity: str
    bytes: int | None
    is_open: bool
    runs: bool


@dataclass(frozen=True)
class PointWork:
    """What a point would do, and what its workspace would hold.

    Attributes:
        stages: all of them.
        carried: the paths that stages depend on and no stage makes.
    """

    stages: tuple[StageWork, ...]
    carried: frozenset[str]

    @property
    def open(self) -> frozenset[str]:
        """The identities of what has to run, or may."""
        return frozenset(stage.identity for stage in self.stages if stage.is_open)

    @property
    def runs(self) -> frozenset[str]:
        """The names of what has to run."""
        return frozenset(stage.name for stage in self.stages if stage.runs)

    @property
    def bytes(self) -> int:
        """Of all outputs."""
        return sum(stage.bytes or 0 for stage in self.stages)


def work_of(root: Path, params: str) -> PointWork:
    """Return what `dvc repro` would do in ``root`` under parameters, with the size of it.

    A size is that of the last run, or what the model's parameters take in the graph's precision,
    whichever is larger.
    """
    with open_view(root, params) as view:
        targets = params_from_config(view.params)["targets"]
        planned = {plan.stage: plan.outcome for plan in plan_stages(view, targets)}
        identities: dict[str, str] = {}
        graph = view.repo.index.graph
        stages = []
        for stage in view.repo.index.stages:
            identity = _identity(view, stage, graph, identities)
            outcome = planned.get(stage.name) if stage.name != _CONSTANT else Outcome.CHECK
            # What nothing can be restored of runs every time: such a one copies, no more.
            kept = not all(out.persist for out in stage.outs)
            runs = outcome is Outcome.RUNS and kept
            size = _bytes(view, stage)
            stages.append(StageWork(stage.name, identity, size, outcome in _WORK, runs))
        made = tuple(out.def_path for stage in view.repo.index.stages for out in stage.outs)
        needed = {
            dep.def_path
            for stage in view.repo.index.stages
            for dep in stage.deps
            if dep not in stage.params and not dep.def_path.startswith("artifacts/")
        }
    return PointWork(tuple(stages), frozenset(needed - set(made)))


def _identity(view: View, stage: PipelineStage, graph: Any, known: dict[str, str]) -> str:
    if stage.name not in known:
        if stage.name == _CONSTANT:
            known[stage.name] = _CONSTANT
            return _CONSTANT
        before = [_identity(view, other, graph, known) for other in graph.successors(stage)]
        values = {key: _value(view.params, key) for dep in stage.params for key in dep.params}
        paths = sorted(dep.def_path for dep in stage.deps)
        text = json.dumps([stage.name, stage.cmd, values, paths, sorted(before)], default=str)
        known[stage.name] = hashlib.sha256(text.encode()).hexdigest()
    return known[stage.name]


def _value(params: Mapping[str, Any], key: str) -> Any:
    value: Any = params
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _bytes(view: View, stage: PipelineStage) -> int | None:
    last, weights = estimate(view, stage).bytes, _bytes_of_weights(view.params, stage.name)
    known = [value for value in (last, weights) if value is not None]
    return max(known) if known else None


def _bytes_of_weights(params: Mapping[str, Any], stage: str) -> int | None:
    """Return what a model's parameters take in what a stage writes; None of other stages."""
    name, _, key = stage.partition("@")
    counts = params["model"]["parameters"]
    if name == "download":
        width = 2 if (params["model"]["source"], params["model"]["dtype"]) == _HALF else 4
        return sum(counts.values()) * width
    graph = None
    if name in ("export", "simplify", "quantize"):
        graph = params["graphs"].get(key)
    elif name in ("build", "wrap"):
        graph = params["graphs"].get(params["engines"][key]["graph"])
    if graph is None:
        return None
    precision = PRECISIONS[graph["precision"]]
    # Layers that a precision leaves alone have that of its source.
    kept = [] if precision.every_layer else [_BYTES[name] for name in precision.sources]
    return int(counts.get(graph["weights"], 0)) * max([_BYTES[precision.dtype], *kept])


@dataclass(frozen=True)
class Space:
    """The bytes that a sweep needs.

    Attributes:
        cache: of new results, each once.
        workspaces: of the working copies, where the file system cannot share them with the cache.
        unknown: how many stages to run have no known size, and are not counted.
    """

    cache: int
    workspaces: int
    unknown: int


def space_of(
    works: Collection[PointWork], jobs: int, *, shared: bool, made: Collection[str] = ()
) -> Space:
    """Return the space that points need.

    Args:
        works: of the points that are to run.
        jobs: how many working copies are to be filled.
        shared: whether a working copy shares its files with the cache.
        made: identities of what the cache has by now.
    """
    new = {
        stage.identity: stage.bytes
        for work in works
        for stage in work.stages
        if stage.is_open and stage.identity not in made
    }
    largest = sorted((work.bytes for work in works), reverse=True)[:jobs]
    return Space(
        cache=sum(value or 0 for value in new.values()),
        workspaces=0 if shared else sum(largest),
        unknown=sum(value is None for value in new.values()),
    )


def check_space(space: Space, cache: Path, workspaces: Path, what: str) -> None:
    """Return if there is room for a sweep.

    Args:
        space: that it needs.
        cache: DVC's, or what of its path exists.
        workspaces: where the working copies are made.
        what: for the message, such as "the sweep precision".

    Raises:
        HardwareError: there is not.
    """
    cache, workspaces = _existing(cache), _existing(workspaces)
    wanted: list[tuple[Path, int]] = [(cache, space.cache), (workspaces, space.workspaces)]
    if cache.stat().st_dev == workspaces.stat().st_dev:
        wanted = [(cache, space.cache + space.workspaces)]
    for folder, needed in wanted:
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise HardwareError(
                f"{what} would fill the disk",
                expected=f"{_gb(needed)} free in {folder}: {_gb(space.cache)} of new results"
                f" and {_gb(space.workspaces)} of working copies",
                found=f"{_gb(free)} free",
                fix="fewer workers (`--jobs 1`) or fewer points; make room (`dvc gc --workspace\n"
                "--all-experiments` drops what neither this workspace nor an experiment has);\n"
                "or move the cache to another disk: `dvc cache dir --local PATH`",
            )


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def shares_files(cache: Path, workspaces: Path) -> bool:
    """Whether the file system clones files, so that a working copy takes no space of its own."""
    from dvc_objects.fs.system import reflink

    cache, workspaces = _existing(cache), _existing(workspaces)
    one, other = cache / ".sweep-space", workspaces / ".sweep-space-clone"
    try:
        one.write_bytes(b"is it shared?")
        reflink(str(one), str(other))  # type: ignore[no-untyped-call]
    except OSError:
        return False
    else:
        return True
    finally:
        one.unlink(missing_ok=True)
        other.unlink(missing_ok=True)


def startable(
    waiting: Sequence[str], running: Collection[str], works: Mapping[str, PointWork], made: set[str]
) -> str | None:
    """Return the first point that makes nothing which a running one is making; None: wait.

    So what points share is made by one of them, and the others take it from the cache.

    Args:
        waiting: names of points.
        running: likewise.
        works: of all of them.
        made: identities that points have made, or failed to make.
    """
    busy = frozenset().union(*(works[name].open for name in running)) - made
    return next((name for name in waiting if not works[name].open & busy), None)
