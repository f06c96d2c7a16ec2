"""Run the stages of a recipe again, in a clone of its commit that is gone afterwards."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from diffusion_engines.dvc_cache import share_cache
from diffusion_engines.errors import BuildError, IntegrityError, first_line
from diffusion_engines.processes import death_with_parent, describe_status
from diffusion_engines.reproduction.recipes import LOCK, Recipe
from diffusion_engines.yaml_files import PARAMS

if TYPE_CHECKING:
    from dvc.repo import Repo


@contextmanager
def rebuilt(root: Path, recipe: Recipe) -> Iterator[Path]:
    """Yield the root of a clone in which a bundle was made again, until the block ends.

    Weights and the recorded reference come from DVC's cache, or from its remote, by their hashes.
    What is made does not enter the cache: it would take the place of nothing there.

    Args:
        root: of the repository.
        recipe: of the bundle.

    Raises:
        IntegrityError: the commit is not the code that made the bundle, or its weights are lost.
        BuildError: a stage failed.
    """
    from dvc.config import Config

    with tempfile.TemporaryDirectory(prefix="diffusion-engines-") as scratch:
        clone = Path(scratch) / "clone"
        _check_out(root, recipe, clone)
        share_cache(root, clone)
        with Config(dvc_dir=str(clone / ".dvc")).edit("local") as local:
            # Else DVC says after each stage that a person should `git add` what is soon gone.
            local["core"]["autostage"] = True
        _check_code(recipe, clone)
        _fetch(recipe, clone)
        _run([step.name for step in recipe.steps], clone)
        yield clone


def _check_out(root: Path, recipe: Recipe, clone: Path) -> None:
    _git("clone", "--quiet", "--shared", "--no-checkout", str(root.resolve()), str(clone))
    _git("-C", str(clone), "checkout", "--quiet", "--detach", recipe.commit)
    (clone / PARAMS).write_text(recipe.params)
    for path, text in recipe.records.items():
        (clone / path).parent.mkdir(parents=True, exist_ok=True)
        (clone / path).write_text(text)
    stages = {**recipe.taken, **{step.name: step.entry for step in recipe.steps}}
    lock = {"schema": "2.0", "stages": {name: dict(entry) for name, entry in stages.items()}}
    (clone / LOCK).write_text(yaml.safe_dump(lock, sort_keys=False))


def _git(*arguments: str) -> None:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise IntegrityError(
            "the commit that made the bundle cannot be checked out",
            expected="a clone with all of its history, and room in the folder for temporary files",
            found=done.stderr.strip(),
            fix="`git fetch --unshallow`, or TMPDIR=… for another folder",
        )


def _check_code(recipe: Recipe, clone: Path) -> None:
    """Compare each stage's command, code, parameters and records with those in its lock entry."""
    from dvc.repo import Repo

    made = {
        out["path"]
        for entry in (*recipe.taken.values(), *(step.entry for step in recipe.steps))
        for out in entry["outs"]
    }
    others: list[str] = []
    with Repo(str(clone)) as repo:
        # Not by `repo.stage`, which looks for dvc.yaml in the current folder.
        stages = {stage.name: stage for stage in repo.index.stages}
        for step in recipe.steps:
            if step.name not in stages:
                others.append(f"{step.name}: no such stage")
                continue
            stage = stages[step.name]
            if stage.cmd_changed:
                others.append(f"{step.name}: another command, {stage.cmd}")
            for dep in stage.deps:
                if not _is_made(dep, made) and (changes := dep.workspace_status()):
                    others += [f"{step.name}: {text}" for text in _texts(dep, changes)]
    if others:
        raise IntegrityError(
            f"the commit {recipe.commit[:12]} is not what made {recipe.bundle.name}",
            expected="the code, parameters and fingerprints that dvc.lock has the hashes of",
            found="\n".join(others[:8]) + (f"\nand {len(others) - 8} more" if others[8:] else ""),
            fix="commit code and params.yaml before `make repro`, and dvc.lock after it; what was\n"
            "made of code that nobody committed cannot be made again",
        )


def _is_made(dep: Any, made: set[str]) -> bool:
    path = str(dep.def_path)
    return any(
        path == out or path.startswith(f"{out}/") or out.startswith(f"{path}/") for out in made
    )


def _texts(dep: Any, changes: Any) -> Iterator[str]:
    for change in changes.values():
        if isinstance(change, dict):  # of a file with parameters, each one
            yield from (f"{key} {what}" for key, what in change.items())
        else:
            yield f"{dep.def_path} {change}"


def _fetch(recipe: Recipe, clone: Path) -> None:
    """Bring what stages take into the clone; of a timing cache it is as well without."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    with Repo(str(clone)) as repo:
        for name, entry in recipe.taken.items():
            paths = [str(clone / out["path"]) for out in entry["outs"] if _is_input(out["path"])]
            try:
                _fetch_paths(repo, paths)
            except DvcException as error:
                if name.startswith("timing@"):
                    continue
                raise IntegrityError(
                    f"what {name} made is neither in DVC's cache nor on its remote",
                    expected=", ".join(
                        f"{out['path']} ({out.get('md5')})"
                        for out in entry["outs"]
                        if _is_input(out["path"])
                    ),
                    found=first_line(error),
                    fix="`dvc fetch` from a remote that has it",
                ) from error


def _is_input(path: str) -> bool:
    return not path.startswith("artifacts/logs/")


def _fetch_paths(repo: Repo, paths: Sequence[str]) -> None:
    from dvc.config import NoRemoteError

    with suppress(NoRemoteError):
        repo.fetch(targets=[*paths])
    repo.checkout(targets=[*paths], force=True)


def _run(stages: Sequence[str], clone: Path) -> None:
    # The clone's own code, whatever is installed.
    paths = [str(clone / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        ["dvc", "repro", "--single-item", "--force", "--no-run-cache", "--no-commit", *stages],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=False,
        preexec_fn=death_with_parent(),
    )
    if done.returncode:
        raise BuildError(
            "the stages could not be run again",
            expected="exit status 0 of `dvc repro`",
            found=describe_status(done.returncode),
            fix="its message above says what to do",
        )
