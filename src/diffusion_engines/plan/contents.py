"""What lies in a workspace now, and what will lie there when stages have been restored or run.

Files and folders are known by DVC's hashes: MD5, and for a folder that of its listing.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffusion_engines.dvc_cache import tree_of

if TYPE_CHECKING:
    from dvc.repo import Repo

# Of a file: the empty path; of a folder: each file below it, by its relative path.
Listing = dict[str, str]


@dataclass(frozen=True)
class Written:
    """What a stage will have written to a path.

    Attributes:
        stage: that writes it.
        hash: DVC's; None where nobody knows before it has run.
        source: the object store that has it; None where that is no object of DVC.
    """

    stage: str
    hash: str | None
    source: Any = None


@dataclass
class Contents:
    """The paths of a workspace, relative to its root, with what stages will have written there."""

    repo: Repo
    _here: dict[str, tuple[str, Listing] | None] = field(default_factory=dict)
    _written: dict[str, Written] = field(default_factory=dict)
    _paths: list[str] = field(default_factory=list)

    def write(self, path: str, written: Written) -> None:
        """Say what will lie at the path of an output."""
        if path not in self._written:
            bisect.insort(self._paths, path)
        self._written[path] = written

    def unknown(self, path: str) -> list[tuple[str, str]]:
        """Return the stages, with their outputs, because of which nobody knows a path's content."""
        return [(w.stage, out) for out, w in self._touching(path) if w.hash is None]

    def hash(self, path: str) -> str | None:
        """Return the hash of what will lie at a path; None where there will be nothing.

        Call it where :meth:`unknown` is empty.
        """
        if not any(True for _ in self._touching(path)):
            return self.hash_now(path)
        if (exact := self._written.get(path)) is not None:
            return exact.hash
        files = self.files(path)
        return (files[""] if "" in files else hash_of_listing(files)) if files else None

    def files(self, path: str) -> Listing:
        """Return the files that will lie at a path; call it where :meth:`unknown` is empty."""
        files = dict(self.files_now(path))
        for out, written in self._touching(path):
            assert written.hash is not None
            listed = listing(written.hash, written.source) or {}
            if path == out or path.startswith(f"{out}/"):
                return _below(listed, path[len(out) + 1 :])
            inside = out[len(path) + 1 :]
            files = {
                n: h for n, h in files.items() if n != inside and not n.startswith(f"{inside}/")
            }
            files |= {f"{inside}/{name}".rstrip("/"): value for name, value in listed.items()}
        return files

    def hash_now(self, path: str) -> str | None:
        """Return the hash of what lies at a path now; None where there is nothing."""
        found = self._now(path)
        return found[0] if found else None

    def files_now(self, path: str) -> Listing:
        """Return the files that lie at a path now."""
        found = self._now(path)
        return found[1] if found else {}

    def _now(self, path: str) -> tuple[str, Listing] | None:
        if path not in self._here:
            self._here[path] = self._look(path)
        return self._here[path]

    def _look(self, path: str) -> tuple[str, Listing] | None:
        from dvc_data.hashfile.build import build

        files = self.repo.fs
        where = files.join(self.repo.root_dir, path)
        try:
            # DVC's own cache of hashes makes this fast, and files are only read where they changed.
            _, _, found = build(
                self.repo.cache.local,
                where,
                files,
                "md5",
                ignore=self.repo.dvcignore,
                dry_run=True,
            )
        except FileNotFoundError:
            return None
        value = found.hash_info.value
        assert value
        return value, _listing_of(found)

    def _touching(self, path: str) -> Iterator[tuple[str, Written]]:
        """Outputs that are at a path, above it or below it."""
        parts = path.split("/")
        for count in range(1, len(parts) + 1):
            above = "/".join(parts[:count])
            if above in self._written:
                yield above, self._written[above]
        start = bisect.bisect_left(self._paths, f"{path}/")
        for below in self._paths[start:]:
            if not below.startswith(f"{path}/"):
                return
            yield below, self._written[below]


def listing(value: str, store: Any) -> Listing | None:
    """Return the files of what DVC has stored under a hash; None where it has not, or not all."""
    from dvc_data.hashfile import load
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_objects.errors import ObjectFormatError

    if not value.endswith(".dir"):
        return {"": value}
    try:
        return _listing_of(load(store, HashInfo("md5", value)))
    except (FileNotFoundError, ObjectFormatError):
        return None


def hash_of_bytes(content: bytes) -> str:
    """Return DVC's hash of a file's content."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def hash_of_listing(files: Listing) -> str:
    """Return DVC's hash of a folder that has these files."""
    return str(tree_of(files).hash_info.value)


def _listing_of(found: Any) -> Listing:
    from dvc_data.hashfile.tree import Tree

    if not isinstance(found, Tree):
        return {"": found.hash_info.value}
    return {"/".join(key): value.value for key, _, value in found if value and value.value}


def _below(files: Listing, folder: str) -> Listing:
    if not folder:
        return files
    if folder in files:
        return {"": files[folder]}
    return {
        name.removeprefix(f"{folder}/"): value
        for name, value in files.items()
        if name.startswith(f"{folder}/")
    }
