"""Why a stage runs: told to it by who started the run, printed as it starts, kept in its log.

`make repro` plans before it starts dvc, and leaves the plan where the stages find it. What depends
on stages before is known only when those have run: then their outputs in dvc.lock say it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusion_engines.files import read_json, write_json
from diffusion_engines.layout import Workspace

# The environment variable that names the file with why each stage would run.
WHY = "DIFFUSION_ENGINES_WHY"
_LOCK = Path("dvc.lock")
_FORMAT = 1


@dataclass(frozen=True)
class Upstream:
    """An output of another stage, and its hash before the run; None where it had none."""

    stage: str
    path: str
    hash: str | None


@dataclass(frozen=True)
class Why:
    """Why a stage would run: what is known beforehand, and what may come of stages before it."""

    reasons: Sequence[str]
    upstream: Sequence[Upstream]


@dataclass(frozen=True)
class Run:
    """How a stage ran.

    Attributes:
        seconds: from the start of its process to its end.
        reasons: why it ran, where somebody planned it.
    """

    seconds: float
    reasons: Sequence[str]


def write_why(path: Path, stages: Mapping[str, Why]) -> None:
    """Leave for each stage why it would run."""
    write_json(path, {name: asdict(why) for name, why in stages.items()})


def reasons_of(stage: str, path: Path, root: Path) -> list[str]:
    """Return why a stage runs, now that its turn has come; nothing where nobody knows.

    Args:
        stage: as DVC calls it.
        path: what :func:`write_why` wrote.
        root: of the repository.
    """
    found = read_json(path).get(stage)
    if found is None:
        return []
    upstream = [Upstream(**one) for one in found["upstream"]]
    return [*found["reasons"], *_changed(upstream, root)]


def _changed(upstream: Iterable[Upstream], root: Path) -> list[str]:
    """Say which outputs have become others; DVC writes each stage to its lock as it ends."""
    import yaml

    outputs = list(upstream)
    if not outputs or not (lock := root / _LOCK).is_file():
        return []
    # Its numbers would be read by other rules than DVC's, but these are paths and hashes.
    stages = yaml.load(lock.read_text(), yaml.CSafeLoader).get("stages", {})
    now = {out["path"]: out.get("md5") for stage in stages.values() for out in stage["outs"]}
    return [
        f"{out.path} is another one ({out.stage} ran)"
        for out in outputs
        if now.get(out.path) != out.hash
    ]


def run_file(stage: str, root: Path) -> Path:
    """Return where a stage's log says how it ran; ``stage`` as DVC calls it."""
    name, _, key = stage.partition("@")
    return Workspace(root).log(name, key or None) / "run.json"


def write_run(path: Path, run: Run) -> None:
    """Keep how a stage ran."""
    write_json(path, {"format": _FORMAT, **asdict(run)})


def run_from_json(value: Mapping[str, Any]) -> Run | None:
    """Return what :func:`write_run` wrote; None where another version of this project did."""
    if value.get("format") != _FORMAT:
        return None
    return Run(value["seconds"], value["reasons"])
