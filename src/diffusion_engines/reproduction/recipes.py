"""How a bundle was made, found by its content in the history of the repository.

A bundle says nothing of its commit, or every commit would change its bytes. dvc.lock has the hash
of each output beside the command, the parameters and the hash of each dependency that made it, so
that the commit which brought a bundle's hash into dvc.lock is the one whose code made it. Whoever
has the bundle finds it, whatever the folder is called and wherever it was copied to.
"""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusion_engines import manifests
from diffusion_engines.dvc_cache import tree_of_folder
from diffusion_engines.environments import (
    ENVIRONMENT,
    Environment,
    commit_of,
    environment_from_json,
)
from diffusion_engines.errors import ConfigError, IntegrityError
from diffusion_engines.layout import Workspace
from diffusion_engines.manifests import Bundle
from diffusion_engines.plan.reading import fast_lock, parse_yaml_12
from diffusion_engines.yaml_files import PARAMS

LOCK = Path("dvc.lock")
# Whose outputs are taken as they are, by their hashes: a build begins with the weights.
_TAKEN = ("check_conf", "download", "reference")
# Whose outputs git has: what this machine is.
_PROBES = ("probe",)


@dataclass(frozen=True)
class Step:
    """A stage that is run again.

    Attributes:
        name: as DVC calls it.
        entry: of dvc.lock: command, dependencies, parameters and outputs with their hashes.
        environment: what it ran with; None: its log is of an earlier version, or nowhere.
    """

    name: str
    entry: Mapping[str, Any]
    environment: Environment | None

    @property
    def command(self) -> str:
        """What DVC's shell runs."""
        return str(self.entry["cmd"]).removeprefix("exec ")


@dataclass(frozen=True)
class Recipe:
    """How a bundle was made.

    Attributes:
        bundle: its manifest.
        folder: where it lies in a workspace.
        commit: whose code made it.
        committed: whether that commit records it; else the workspace alone does.
        clean: whether the code is the commit's; of a commit that records it, its hashes decide.
        params: text of params.yaml.
        taken: entries of dvc.lock by stage, whose outputs are fetched.
        steps: in the order in which they run.
        records: texts of the fingerprints, by path.
    """

    bundle: Bundle
    folder: str
    commit: str
    committed: bool
    clean: bool
    params: str
    taken: Mapping[str, Mapping[str, Any]]
    steps: tuple[Step, ...]
    records: Mapping[str, str]


def find_recipe(root: Path, folder: Path) -> Recipe:
    """Return how a bundle was made, as the repository in ``root`` records it.

    Args:
        root: of the repository.
        folder: the bundle, of this workspace or a copy of one, such as in a release.

    Raises:
        ConfigError: the repository does not record it.
        IntegrityError: the bundle is damaged.
    """
    bundle = manifests.read(folder, Bundle)
    commit_here, clean = commit_of(root)
    if commit_here is None:
        raise ConfigError(
            "there is no commit here that could have made a bundle",
            expected="a clone of the repository that built it",
            found=str(root.resolve()),
            fix="call it there",
        )
    path = Workspace().bundle(bundle.target, bundle.component).as_posix()
    digest = str(tree_of_folder(folder).oid)
    for commit in _commits(root, digest):
        lock = _stages(_committed(root, commit, LOCK))
        if _hash_in(lock, path) == digest:
            return _recipe(bundle, path, lock, _Revision(root, commit), commit)
    here = root / LOCK
    lock = _stages(here.read_text()) if here.is_file() else {}
    if _hash_in(lock, path) != digest:
        raise ConfigError(
            f"{folder} was not made by any state of this repository",
            expected=f"a commit here, or dvc.lock, that records {path} as {digest}",
            found=f"{_hash_in(lock, path) or 'nothing'} in dvc.lock",
            fix="call it in a clone of the repository that built it, with all of its history\n"
            "(`git fetch --all`); who built it commits dvc.lock",
        )
    recipe = _recipe(bundle, path, lock, _Workspace(root), commit_here)
    return replace(recipe, committed=False, clean=clean)


def _recipe(
    bundle: Bundle,
    path: str,
    lock: Mapping[str, Any],
    state: _Revision | _Workspace,
    commit: str,
) -> Recipe:
    order = list(_upstream(lock, f"wrap@{bundle.name}"))
    steps: list[Step] = []
    taken: dict[str, Mapping[str, Any]] = {}
    records: dict[str, str] = {}
    for name in order:
        entry, stage = lock[name], name.partition("@")[0]
        if stage in _TAKEN:
            taken[name] = entry
        elif stage in _PROBES:
            records |= {out["path"]: state.text(Path(out["path"])) for out in entry["outs"]}
        else:
            steps.append(Step(name, entry, _environment(entry, state)))
    # Of what an earlier build measured, so that this one chooses the same kernels.
    timing = f"timing@{bundle.target}"
    if timing in lock:
        taken[timing] = lock[timing]
    return Recipe(
        bundle=bundle,
        folder=path,
        commit=commit,
        committed=True,
        clean=True,
        params=state.text(PARAMS),
        taken=taken,
        steps=tuple(steps),
        records=records,
    )


def _upstream(lock: Mapping[str, Any], stage: str) -> Iterator[str]:
    """Yield the stages that one needs and then itself; what is taken needs nothing."""
    writers = {out["path"]: name for name, entry in lock.items() for out in entry.get("outs", ())}
    done: set[str] = set()

    def visit(name: str) -> Iterator[str]:
        if name in done:
            return
        done.add(name)
        if name.partition("@")[0] not in (*_TAKEN, *_PROBES):
            for dep in lock[name].get("deps", ()):
                for out, writer in writers.items():
                    if _same_place(out, dep["path"]):
                        yield from visit(writer)
        yield name

    yield from visit(stage)


def _same_place(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}/") or other.startswith(f"{one}/")


def _environment(entry: Mapping[str, Any], state: _Revision | _Workspace) -> Environment | None:
    for out in entry["outs"]:
        if out["path"].startswith("artifacts/logs/"):
            with suppress(FileNotFoundError, IntegrityError):
                return environment_from_json(state.text(Path(out["path"]) / ENVIRONMENT))
    return None


@dataclass(frozen=True)
class _Workspace:
    """The working copy."""

    root: Path

    def text(self, path: Path) -> str:
        return (self.root / path).read_text()


@dataclass(frozen=True)
class _Revision:
    """A commit: what git has of it, and what DVC's cache or remote have."""

    root: Path
    commit: str

    @functools.cached_property
    def files(self) -> Any:
        from dvc.api import DVCFileSystem

        return DVCFileSystem(str(self.root), rev=self.commit)

    def text(self, path: Path) -> str:
        from dvc.exceptions import DvcException

        try:
            return _committed(self.root, self.commit, path)
        except FileNotFoundError:
            try:
                with fast_lock():
                    return str(self.files.read_text(path.as_posix()))
            except DvcException as error:
                raise FileNotFoundError(path) from error


def _stages(text: str) -> Mapping[str, Any]:
    return dict((parse_yaml_12(text) or {}).get("stages") or {})


def _hash_in(lock: Mapping[str, Any], path: str) -> str | None:
    for entry in lock.values():
        for out in entry.get("outs", ()):
            if out["path"] == path:
                return str(out.get("md5"))
    return None


def _commits(root: Path, digest: str) -> list[str]:
    """Return the commits that brought a hash into dvc.lock or took it out, the oldest first."""
    log = _git(root, "log", "--all", "--reverse", "--format=%H", f"-S{digest}", "--", str(LOCK))
    return log.split()


def _committed(root: Path, commit: str, path: Path) -> str:
    try:
        return _git(root, "show", f"{commit}:{path.as_posix()}")
    except subprocess.CalledProcessError as error:
        raise FileNotFoundError(path) from error


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout
