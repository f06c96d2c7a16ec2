"""What one revision's engines are and measured, read from git, DVC's cache or its remote."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from diffusion_engines import manifests
from diffusion_engines.bench.results import Benchmark, read_benchmark
from diffusion_engines.errors import ConfigError, DiffusionEnginesError, IntegrityError
from diffusion_engines.files import MANIFEST
from diffusion_engines.layout import Workspace
from diffusion_engines.manifests import Engine
from diffusion_engines.parity.results import Validation, read_validation
from diffusion_engines.yaml_files import PARAMS, read_mapping

# The state of the working copy, in place of a revision.
WORKSPACE = "workspace"
T = TypeVar("T")


@dataclass(frozen=True)
class State:
    """The engines of some targets in one revision.

    Attributes:
        name: of the revision, for people.
        engines: by target and component.
        validations, benchmarks: by target, where there are any.
        pictures: of the validations, by target.
        unread: why something that may be there could not be read.
    """

    name: str
    engines: Mapping[tuple[str, str], Engine]
    validations: Mapping[str, Validation]
    benchmarks: Mapping[str, Benchmark]
    pictures: Mapping[str, tuple[Path, ...]]
    unread: tuple[str, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        """Those that have an engine, in the order of their names."""
        return tuple(sorted({target for target, _ in self.engines}))


@contextlib.contextmanager
def state_of(root: Path, revision: str) -> Iterator[State]:
    """Yield the state of a revision; its pictures are there until the block ends.

    Args:
        root: of the repository.
        revision: of git, such as ``HEAD~1``; :data:`WORKSPACE`: what lies in the working copy.

    Raises:
        ConfigError: there is no such revision, or it has no engines.
    """
    if revision == WORKSPACE:
        yield _read(revision, Workspace(root), read_mapping(root / PARAMS))
        return
    with tempfile.TemporaryDirectory(prefix="diffusion-engines-") as folder:
        workspace = Workspace(Path(folder))
        tables = _fetch(root, revision, workspace)
        yield _read(revision, workspace, tables)


def _fetch(root: Path, revision: str, workspace: Workspace) -> Mapping[str, Any]:
    """Bring the small files of a revision's results into a folder, as they lie in a workspace."""
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException

    try:
        files = DVCFileSystem(str(root), rev=revision)
        tables = yaml.safe_load(files.read_text(str(PARAMS)))
    except (DvcException, FileNotFoundError) as error:
        raise ConfigError(
            f"there is no revision {revision} to compare",
            expected="a branch, tag or commit of this repository, or `workspace`",
            found=str(error),
            fix="`git log --oneline` lists them",
        ) from error

    def get(path: Path) -> None:
        name = path.relative_to(workspace.root).as_posix()
        with contextlib.suppress(FileNotFoundError):
            data = files.read_bytes(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    for engine in tables["engines"].values():
        get(workspace.engine(engine["target"], engine["component"]) / MANIFEST)
    for target in tables["measured"]:
        get(workspace.benchmark(target) / "benchmark.json")
        folder = workspace.validation(target)
        get(folder / "validation.json")
        with contextlib.suppress(DiffusionEnginesError):
            for image in read_validation(folder).images:
                get(folder / image.file)
    return tables


def _read(name: str, workspace: Workspace, tables: Mapping[str, Any]) -> State:
    engines: dict[tuple[str, str], Engine] = {}
    for engine in tables["engines"].values():
        target, component = engine["target"], engine["component"]
        folder = workspace.engine(target, component)
        if (folder / MANIFEST).is_file():
            engines[target, component] = manifests.read(folder, Engine, verify=False)
    if not engines:
        raise ConfigError(
            f"{name} has no engines to compare",
            expected="dvc.lock in that commit, and its results in DVC's cache or on the remote",
            found="none",
            fix="`make repro` and commit dvc.lock; of an older commit, `dvc fetch --all-commits`",
        )
    measured = list(tables["measured"])
    benchmarks, unread = _results(read_benchmark, map(workspace.benchmark, measured))
    validations, too = _results(read_validation, map(workspace.validation, measured))
    pictures = {
        target: tuple(workspace.validation(target) / image.file for image in found.images)
        for target, found in validations.items()
    }
    there = {t: tuple(path for path in paths if path.is_file()) for t, paths in pictures.items()}
    return State(name, engines, validations, benchmarks, there, (*unread, *too))


def _results(read: Callable[[Path], T], folders: Iterable[Path]) -> tuple[dict[str, T], list[str]]:
    """Return the results of targets, and why that of another could not be read."""
    found, unread = {}, []
    for folder in folders:
        if folder.is_dir():
            try:
                found[folder.name] = read(folder)
            except IntegrityError as error:
                unread.append(error.in_a_line)
    return found, unread
