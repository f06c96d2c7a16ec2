"""Find the objects of a cache or a remote that no clone needs, and drop them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from diffusion_engines.errors import ConfigError, DiffusionEnginesError, first_line
from diffusion_engines.garbage.leases import Lease, lease_of, read_leases, write_lease
from diffusion_engines.garbage.needed import files_of_folder, needed_objects, refuse_stale_refs
from diffusion_engines.runs import refuse_during_a_run

# Somebody's push uploads its objects before their lease.
GRACE_HOURS = 24.0
_FOLDER = ".dir"


@dataclass(frozen=True)
class Unneeded:
    """An object that no clone is known to need.

    Attributes:
        oid: its name: an MD5, with ``.dir`` for the list of a folder's files.
        output: the output that it was a state of, or "" where nothing here says so.
        bytes: its size.
        made: when it was written, in seconds since 1970.
    """

    oid: str
    output: str
    bytes: int
    made: float


@dataclass(frozen=True)
class Collection:
    """What would be dropped.

    Attributes:
        where: the folder or the URL.
        bytes: of all objects there.
        unneeded: bytes that no clone is known to need.
        young: bytes among them that are too young to be dropped.
        drop: what is to be dropped, the oldest first.
        leases: of other clones.
    """

    where: str
    bytes: int
    unneeded: int
    young: int
    drop: tuple[Unneeded, ...]
    leases: tuple[Lease, ...]

    @property
    def freed(self) -> int:
        """Bytes that dropping frees: fewer where links or clones share a file's blocks."""
        return sum(one.bytes for one in self.drop)


def collect(
    root: Path,
    agrees: Callable[[Collection], bool],
    *,
    remote: bool = False,
    budget: int | None = None,
    grace_hours: float = GRACE_HOURS,
) -> Collection:
    """Drop what no clone needs, if ``agrees`` says so of what would be dropped.

    Renews this clone's lease first, on the cache or the remote that is looked at.

    Args:
        root: of the repository.
        agrees: is asked once, if there is something to be dropped.
        remote: of the default remote in place of this machine's cache.
        budget: bytes; the oldest go first until no more than that is there. Without: all go.
        grace_hours: what is younger stays.

    Raises:
        BusyError: a run works in this folder.
        ConfigError: what is needed is not known for sure, or the remote does not answer.
        IntegrityError: likewise: a lease, a receipt, or the list of a needed folder's files.
    """
    with _objects(root, remote=remote) as (repo, odb):
        if remote:
            refuse_stale_refs(root)
        needed = needed_objects(root)
        lease = lease_of(root, needed)
        write_lease(odb, lease)
        found = _look(repo, odb, lease, budget, grace_hours)
        if not found.drop or not agrees(found):
            return found
        # A person may have thought for long: what was pushed or leased meanwhile stays.
        if not remote:
            refuse_during_a_run(root)
        odb.fs.fs.invalidate_cache()  # s3fs remembers what it listed
        lease = lease_of(root, needed_objects(root))
        kept = _kept(repo, odb, lease, read_leases(odb))
        doomed = [one for one in found.drop if one.oid not in kept]
        # Who sees the list of a folder's files counts on them.
        for one in sorted(doomed, key=lambda one: not one.oid.endswith(_FOLDER)):
            with suppress(FileNotFoundError):
                odb.fs.remove(odb.oid_to_path(one.oid))
        if remote:
            from dvc_data.hashfile.db import get_index

            get_index(odb).clear()  # by which `dvc push` would skip them
        return found


def renew_lease(root: Path, *, remote: bool) -> Lease:
    """Say, beside the cache or on the default remote, what this clone needs.

    Raises:
        ConfigError: there is no remote, it does not answer, or a dvc.lock cannot be read.
        IntegrityError: a receipt cannot be read, or is of a commit that is not here.
    """
    with _objects(root, remote=remote) as (_, odb):
        lease = lease_of(root, needed_objects(root))
        write_lease(odb, lease)
    return lease


@contextmanager
def _objects(root: Path, *, remote: bool) -> Iterator[tuple[Any, Any]]:
    """Yield DVC's repository and the objects of its cache, or of its default remote."""
    from dvc.config import NoRemoteError
    from dvc.repo import Repo

    if not remote:
        refuse_during_a_run(root)
    with Repo(str(root)) as repo:
        if not remote:
            with repo.lock:
                yield repo, repo.cache.local
            return
        try:
            yield repo, repo.cloud.get_remote_odb(command="gc")
        except NoRemoteError as error:
            raise ConfigError(
                "there is no remote", fix="`dvc remote add -d shared URL`, or leave --remote out"
            ) from error
        except DiffusionEnginesError:
            raise
        except Exception as error:  # of whatever speaks the remote's protocol
            raise ConfigError("the remote gave an error", found=first_line(error)) from error


def _look(repo: Any, odb: Any, lease: Lease, budget: int | None, grace_hours: float) -> Collection:
    leases = read_leases(odb)
    kept = _kept(repo, odb, lease, leases)
    objects = list(_list(odb))
    outputs = _outputs_of(repo)
    unneeded = [
        Unneeded(oid, outputs.get(oid, ""), size, made)
        for oid, size, made in objects
        if oid not in kept
    ]
    old = [one for one in unneeded if one.made <= time.time() - grace_hours * 3600]
    there = sum(size for _, size, _ in objects)
    drop = []
    left = there
    for one in sorted(old, key=lambda one: one.made):
        if budget is not None and left <= budget:
            break
        drop.append(one)
        left -= one.bytes
    lost = sum(one.bytes for one in unneeded)
    return Collection(
        where=odb.fs.unstrip_protocol(odb.path),
        bytes=there,
        unneeded=lost,
        young=lost - sum(one.bytes for one in old),
        drop=tuple(drop),
        leases=tuple(other for other in leases if other.clone != lease.clone),
    )


def _kept(repo: Any, odb: Any, lease: Lease, leases: list[Lease]) -> set[str]:
    """Return what clones need, with the files of each folder that is here or there.

    A list that is on neither side was never pushed, or is damaged: its folder cannot be restored
    from here, and whoever has it pushes its files anew.
    """
    named = {oid for one in (lease, *leases) for oid in one.objects}
    kept = set(named)
    for oid in named:
        if oid.endswith(_FOLDER):
            for side in (repo.cache.local, odb):
                if (files := _files(side, oid)) is not None:
                    kept.update(files)
                    break
    return kept


def _files(odb: Any, oid: str) -> list[str] | None:
    """Return the files of a folder; None where its list is missing or damaged."""
    try:
        with odb.fs.open(odb.oid_to_path(oid), "rb") as file:
            return list(files_of_folder(file.read()).values())
    except (FileNotFoundError, ValueError):
        return None


def _list(odb: Any) -> Iterator[tuple[str, int, float]]:
    """Yield name, size in bytes and time of writing of each object."""
    if not odb.fs.exists(odb.path):
        return
    for path in odb.fs.find(odb.path):
        with suppress(ValueError, FileNotFoundError):  # an upload under way has no object's name
            oid = odb.path_to_oid(path)
            about = odb.fs.info(path)
            made = about.get("mtime") or about["LastModified"]
            yield (
                oid,
                about["size"],
                made.timestamp() if isinstance(made, datetime) else float(made),
            )


def _outputs_of(repo: Any) -> dict[str, str]:
    """Return the path of the output by object, of all the states that the run-cache knows."""
    import yaml

    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    outputs = {}
    for path in Path(repo.stage_cache.cache_dir).glob("??/*/*"):
        with suppress(OSError, ValueError, AttributeError, TypeError, KeyError, yaml.YAMLError):
            for out in yaml.load(path.read_text(), loader)["outs"]:  # noqa: S506 - makes texts
                outputs[out["md5"]] = out["path"]
                for oid in _files(repo.cache.local, out["md5"]) or ():
                    outputs.setdefault(oid, out["path"])
    return outputs
