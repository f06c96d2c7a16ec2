"""Hash the objects of DVC's cache again, and mend those that are damaged or missing.

DVC trusts a cache file that is read-only: neither checkout nor status nor repro reads it again, so
that a damaged one is checked out each time its output is removed. And it remembers the hash of a
workspace file by time and inode, so that a file checked out from a damaged object passes for whole.
Here everything is hashed from its bytes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffusion_engines.dvc_cache import md5_of_file, tree_of_folder
from diffusion_engines.errors import ConfigError, first_line
from diffusion_engines.progress import progress
from diffusion_engines.runs import refuse_during_a_run


@dataclass(frozen=True)
class Finding:
    """An object that is not, byte for byte, what its name says.

    Attributes:
        path: in the workspace, of the file or folder that it is the content of; "" if of none.
        oid: its name in the cache: an MD5, with ``.dir`` for the list of a folder's files.
        problem: what was found; a damaged one has been removed.
        stage: that makes it; "" if it is of no output of this workspace.
        cure: where a good copy came from; "" if there is none.
    """

    path: str
    oid: str
    problem: Literal["damaged", "missing"]
    stage: str = ""
    cure: str = ""

    def __str__(self) -> str:
        """One line for a person."""
        if self.cure:
            done = f"a good copy came from {self.cure}"
        elif self.stage:
            done = f"no good copy was found: {self.stage} makes it again"
        else:
            done = "removed"
        return f"{self.path or 'of no output here'}: {self.problem} ({self.oid}); {done}"


@dataclass
class Report:
    """What was looked at, and found.

    Attributes:
        objects: how many were hashed.
        bytes: of them.
        findings: what was wrong.
        absent: outputs of which nothing is on this machine: nobody has built or fetched them.
        uploaded: paths of the objects that the remote lacked, where it was asked.
        remote: paths of those that it still lacks.
        notes: what could not be done, a sentence each.
    """

    objects: int = 0
    bytes: int = 0
    findings: list[Finding] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    uploaded: list[str] = field(default_factory=list)
    remote: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def left(self) -> list[str]:
        """The stages that have to make something again."""
        left = [found.stage for found in self.findings if found.stage and not found.cure]
        return list(dict.fromkeys(left))


def verify_cache(root: Path, *, everything: bool = False, remote: bool = False) -> Report:
    """Hash the objects of the local cache that dvc.lock names, and mend what is wrong.

    A damaged object is removed. A good copy comes from the workspace's own file if that has the
    right hash, else from the default remote. Otherwise its stage will make it again: the damaged
    file in the workspace is removed too.

    Args:
        root: of the repository.
        everything: also look at the objects that dvc.lock does not name, such as those of others
            who share the cache.
        remote: also ask the default remote which objects it lacks, and upload them. ``dvc push``
            goes by a list of what it once uploaded, and asks for none of them again.

    Raises:
        BusyError: a run works in this folder.
        ConfigError: a remote is to be asked, and there is none, or it does not answer.
    """
    from dvc.repo import Repo

    refuse_during_a_run(root)
    with Repo(str(root)) as repo:
        cache = _Cache(repo, root)
        with repo.lock:
            whole = cache.verify_outputs()
            # The files of a folder whose list is lost are somewhere among the others, and a stage
            # that makes them again would not replace a damaged one.
            if everything or not whole:
                cache.verify_others()
        if cache.checkouts:
            repo.checkout(sorted(cache.checkouts), force=True)
        if remote:
            cache.ask_remote()
    return cache.report


@dataclass(frozen=True)
class _Place:
    """Where the content of an object belongs."""

    out: Any  # dvc.output.Output
    path: Path


class _Cache:
    """The local cache of a repository, and where else its objects may be."""

    def __init__(self, repo: Any, root: Path) -> None:
        self.repo, self.root, self.odb = repo, root.resolve(), repo.cache.local
        self.report = Report()
        self.places: dict[str, list[_Place]] = {}
        self.checkouts: set[str] = set()  # outputs to be put into the workspace again

    def verify_outputs(self) -> bool:
        """Return whether the list of every folder's files is there."""
        outs = [out for out in self.repo.index.outs if out.use_cache and out.hash_info]
        here = [out for out in outs if self.is_here(out)]
        self.report.absent = [self.name(Path(out.fs_path)) for out in outs if out not in here]
        for out in here:
            place = _Place(out, Path(out.fs_path))
            self.places.setdefault(out.hash_info.value, []).append(place)
        folders = [oid for oid in self.places if _is_folder(oid)]
        for oid in folders:  # before their files, which they list
            self.verify(oid)
            for name, path in self.files_of(oid):
                for place in self.places[oid]:
                    file = _Place(place.out, place.path / path)
                    self.places.setdefault(name, []).append(file)
        files = [oid for oid in self.places if not _is_folder(oid)]
        for oid in progress(files, "verify", total=len(files)):
            self.verify(oid)
        return all(map(self.odb.exists, folders))

    def verify_others(self) -> None:
        others = [oid for oid in self.odb.all() if oid not in self.places]
        for oid in progress(others, "verify what dvc.lock does not name", total=len(others)):
            self.verify(oid)

    def is_here(self, out: Any) -> bool:
        """Whether anything of an output is on this machine."""
        oid = out.hash_info.value
        if Path(out.fs_path).exists() or not self.odb.exists(oid):
            return Path(out.fs_path).exists()
        files = [name for name, _ in self.files_of(oid)] if _is_folder(oid) else []
        return not files or any(map(self.odb.exists, files))

    def files_of(self, oid: str) -> Iterator[tuple[str, str]]:
        """Yield object and relative path of each file of a folder; nothing if it is unreadable."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            listed = json.loads(Path(self.odb.oid_to_path(oid)).read_bytes())
            yield from [(entry["md5"], entry["relpath"]) for entry in listed]

    def verify(self, oid: str) -> None:
        if self.odb.exists(oid):
            self.report.objects += 1
            self.report.bytes += Path(self.odb.oid_to_path(oid)).stat().st_size
            if self.is_good(oid):
                return
            self.odb.delete(oid)
            self.mend(oid, "damaged")
        else:
            self.mend(oid, "missing")

    def is_good(self, oid: str) -> bool:
        return md5_of_file(Path(self.odb.oid_to_path(oid))) == oid.split(".", maxsplit=1)[0]

    def mend(self, oid: str, problem: Literal["damaged", "missing"]) -> None:
        places = self.places.get(oid, [])
        cure = self.from_workspace(oid, places) or (self.from_remote(oid) if places else "")
        for place in places:
            if place.path.is_file() and md5_of_file(place.path) != oid:
                place.path.unlink()  # DVC takes it for whole
            if cure and not place.path.exists():
                self.checkouts.add(place.out.fs_path)
            found = Finding(self.name(place.path), oid, problem, place.out.stage.addressing, cure)
            self.report.findings.append(found)
        if not places:
            self.report.findings.append(Finding("", oid, problem))

    def from_workspace(self, oid: str, places: list[_Place]) -> str:
        for place in places:
            if _is_folder(oid):
                tree = tree_of_folder(place.path) if place.path.is_dir() else None
                if tree is not None and tree.oid == oid:
                    self.odb.add(tree.path, tree.fs, oid)
                    return "the workspace"
            elif place.path.is_file() and md5_of_file(place.path) == oid:
                self.odb.add(str(place.path), self.odb.fs, oid)
                return "the workspace"
        return ""

    def from_remote(self, oid: str) -> str:
        remote = self.remote
        if remote is None:
            return ""
        try:
            if not remote.exists(oid):
                return ""
            self.odb.add(remote.oid_to_path(oid), remote.fs, oid)
        except Exception as error:  # of whatever speaks the remote's protocol
            self.note(f"the remote could not be read: {first_line(error)}")
            self.remote = None
            return ""
        if self.is_good(oid):
            return "the remote"
        self.odb.delete(oid)
        self.note(f"the remote's own copy is damaged: {remote.oid_to_path(oid)}")
        return ""

    @functools.cached_property
    def remote(self) -> Any:
        """The objects of the default remote; None: there is none, or no way to it."""
        from dvc.config import NoRemoteError
        from dvc.exceptions import DvcException

        try:
            return self.repo.cloud.get_remote_odb(command="verify")
        except NoRemoteError:
            return None
        except DvcException as error:
            self.note(f"the remote could not be asked: {first_line(error)}")
            return None

    def ask_remote(self) -> None:
        if self.remote is None:
            raise ConfigError(
                "there is no remote to be asked",
                found="; ".join(self.report.notes) or "none",
                fix="`dvc remote add -d shared URL`, and what its message asks for",
            )
        try:
            there = set(self.remote.oids_exist(list(self.places)))
        except Exception as error:
            raise ConfigError("the remote does not answer", found=first_line(error)) from error
        missing = [oid for oid in self.places if oid not in there]
        for oid in sorted(missing, key=_is_folder):  # who sees a folder counts on its files
            name = self.name(self.places[oid][0].path)
            if self.odb.exists(oid) and self.upload(oid):
                self.report.uploaded.append(name)
            else:
                self.report.remote.append(name)

    def upload(self, oid: str) -> bool:
        try:
            self.remote.add(self.odb.oid_to_path(oid), self.odb.fs, oid)
        except Exception as error:  # of whatever speaks the remote's protocol
            self.note(f"the remote takes no upload: {first_line(error)}")
            return False
        return True

    def note(self, text: str) -> None:
        if text not in self.report.notes:
            self.report.notes.append(text)

    def name(self, path: Path) -> str:
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)


def _is_folder(oid: str) -> bool:
    return oid.endswith(".dir")


def print_report(report: Report) -> None:
    """Say what was found: a line for each object that is wrong, and a sentence at the end."""
    for found in report.findings:
        print(found)
    for path in report.uploaded:
        print(f"{path}: was missing on the remote; uploaded")
    for path in report.remote:
        print(f"{path}: missing on the remote, and not uploaded")
    for note in report.notes:
        print(note)
    if report.absent:
        some = ", ".join(report.absent[:3]) + (" …" if len(report.absent) > 3 else "")
        print(f"{len(report.absent)} outputs are not on this machine ({some}): `dvc pull`")
    cured = sum(bool(found.cure) for found in report.findings)
    print(
        f"{report.objects} objects hashed, {report.bytes / 1e9:.2f} GB: "
        f"{len(report.findings)} damaged or missing, {cured} of them mended"
    )
    if report.left:
        print(f"`make repro` makes the rest again: {', '.join(report.left)}")
