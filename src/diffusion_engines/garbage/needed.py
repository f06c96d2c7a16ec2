"""What a clone needs: the objects that dvc.lock names in the workspace, in refs and in releases."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from diffusion_engines.errors import ConfigError, IntegrityError
from diffusion_engines.files import read_json
from diffusion_engines.merging import LOCK

_RELEASE = "release"
_RECEIPT = "receipt.json"
_SHARED_REFS = ("refs/heads/", "refs/tags/", "refs/exps/")


def needed_objects(root: Path) -> set[str]:
    """Return the MD5s of outputs, with ``.dir`` for folders, that a clone of ``root`` needs.

    They are those of the workspace, of the tip of each branch (also as last fetched from others),
    tag and experiment, of stashes with the queued experiments, and of the commits that the
    receipts in ``release/`` name. Older commits are not among them: what is to stay has a tag.

    Raises:
        ConfigError: a dvc.lock cannot be read, so that what it needs is not known.
        IntegrityError: a receipt cannot be read, or is of a commit that is not here.
    """
    commits = _tips(root) | _released(root)
    blobs = {blob for commit in commits for blob in _records(root, commit)}
    texts = [(str(path), path.read_text()) for path in (root / LOCK,) if path.is_file()]
    texts += [(blob, _git(root, "cat-file", "blob", blob)) for blob in sorted(blobs)]
    return {oid for name, text in texts for oid in _outputs(name, text)}


def refuse_stale_refs(root: Path) -> None:
    """Return if this clone has every branch, tag and experiment that its git remotes have.

    Raises:
        ConfigError: it lacks some, or a git remote does not answer.
    """
    for remote in _git(root, "remote").split():
        lines = _git(root, "ls-remote", remote).splitlines()
        pairs = [line.split("\t") for line in lines]
        theirs = [(commit, ref) for commit, ref in pairs if ref.startswith(_SHARED_REFS)]
        if missing := [ref for commit, ref in theirs if not _is_here(root, commit)]:
            raise ConfigError(
                f"{remote} has what this clone has not fetched: what it needs is not known",
                expected="every branch, tag and experiment of it",
                found=f"not {', '.join(missing[:6])}",
                fix=f"`git fetch --tags {remote}`, and `dvc exp pull {remote} -A` for experiments",
            )


def _tips(root: Path) -> set[str]:
    kinds = "%(refname) %(objectname) %(objecttype)"
    peeled = "%(refname) %(*objectname) %(*objecttype)"
    shown = f"--format=%(if)%(*objectname)%(then){peeled}%(else){kinds}%(end)"
    refs = [line.split() for line in _git(root, "for-each-ref", shown).splitlines()]
    tips = {commit for _, commit, kind in refs if kind == "commit"}
    for name, *_ in refs:
        if name.endswith("/stash"):  # git's and DVC's queues are a ref's log
            tips.update(_git(root, "reflog", "show", "--format=%H", name).split())
    head = _git(root, "rev-parse", "--verify", "--quiet", "HEAD", check=False).strip()
    return tips | ({head} if head else set())


def _released(root: Path) -> set[str]:
    commits = set()
    for path in sorted((root / _RELEASE).rglob(_RECEIPT)):
        commit = read_json(path).get("commit")
        if not commit:
            continue
        if not _is_here(root, commit):
            raise IntegrityError(
                f"{path} is of a commit that is not in this clone: what it needs is not known",
                expected="the history of each release",
                found=commit,
                fix=f"`git fetch --all --tags`, or move {path.parent} out of {_RELEASE}/",
            )
        commits.add(commit)
    return commits


def _records(root: Path, commit: str) -> Iterator[str]:
    """Yield git's hashes of the files in which DVC records outputs."""
    for entry in _git(root, "ls-tree", "-r", "-z", "--full-tree", commit).split("\0"):
        about, _, path = entry.partition("\t")
        if path.rpartition("/")[2] == LOCK or path.endswith(".dvc"):
            yield about.split()[2]


def _outputs(name: str, text: str) -> Iterator[str]:
    import yaml

    # As text alone: a hash is never a number, and libyaml reads a large one in a second.
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    try:
        record = yaml.load(text, loader) or {}  # noqa: S506 - this loader makes texts
        stages: Iterable[Any] = [record, *(record.get("stages") or {}).values()]
        yield from [
            out["md5"] for stage in stages for out in stage.get("outs") or () if "md5" in out
        ]
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{name} cannot be read: what it needs is not known",
            found=str(error).splitlines()[0],
            fix="`diffusion-engines merge-lock`, where git stopped at a conflict",
        ) from error


def _is_here(root: Path, commit: str) -> bool:
    command = ["git", "cat-file", "-e", commit]
    return not subprocess.run(command, cwd=root, capture_output=True, check=False).returncode


def _git(root: Path, *arguments: str, check: bool = True) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    if done.returncode and check:
        raise ConfigError(
            "git does not say what this clone needs",
            expected=f"`git {' '.join(arguments)}` to answer",
            found=done.stderr.strip() or f"status {done.returncode}",
        )
    return done.stdout


def files_of_folder(listed: bytes) -> dict[str, str]:
    """Return the MD5s of a folder's files by path, from DVC's list of them.

    Raises:
        ValueError: it is no such list.
    """
    try:
        return {entry["relpath"]: entry["md5"] for entry in json.loads(listed)}
    except (TypeError, KeyError) as error:
        raise ValueError("no list of files") from error
