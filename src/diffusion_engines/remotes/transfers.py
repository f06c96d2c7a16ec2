"""Objects of dvc.lock, fetched from the default remote and brought to it, each by its hash.

``dvc push`` goes by a list of what it once uploaded, and says of an object that is gone that all is
up to date; ``dvc pull`` takes what a remote without ``verify true`` has for whole. Here the remote
is asked for each object, and what comes is hashed before it has its name.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from diffusion_engines.errors import RemoteError, first_line
from diffusion_engines.files import write_json
from diffusion_engines.remotes.watching import Pulse

if TYPE_CHECKING:
    from dvc.repo import Repo

T = TypeVar("T")

_THREADS = 8
_DAY = 86_400.0
# Objects that this clone knows to be damaged on the remote, which their size does not tell.
_DAMAGED = Path(".dvc/tmp/damaged-on-remote.json")
# s3fs tells of progress once a part; its own 50 MiB would be silence on a slow line.
# One part at a time: servers that store them as they come, such as rclone, wait for the one before.
_PARTS = {"s3": {"chunksize": 8 * 2**20, "max_concurrency": 1}}


@dataclass
class Transfer:
    """What went over the line, and what could not.

    Attributes:
        objects: how many were transferred.
        bytes: of them.
        damaged: paths whose object on the remote is not what its name says, and why.
        missing: paths of which the remote, and for a push the local cache too, has no object.
        wanted: whether anything was to be transferred, or had to be looked for.
        failed: what ended it early; "" if nothing did.
    """

    objects: int = 0
    bytes: int = 0
    damaged: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    wanted: bool = False
    failed: str = ""


def fetch(root: Path, pulse: Pulse, *, current: bool = False) -> Transfer:
    """Fetch what dvc.lock names and the local cache lacks.

    Args:
        root: of the repository.
        pulse: called with each progress.
        current: leave out what would be made anew: outputs of stages whose command, parameters or
            files differ from those of dvc.lock, and of those that need them.

    Raises:
        RemoteError: the remote refuses, or cannot be reached.
    """
    done = Transfer()
    with _opened(root) as repo:
        cache = repo.cache.local
        stale = _stale_stages(repo) if current else set()
        outs = [out for out in _outs(repo) if out.stage not in stale]
        done.wanted = bool(stale)
        wanted = {out.hash_info.value: _name(root, out) for out in outs}
        lists = {oid: name for oid, name in wanted.items() if _is_list(oid)}
        if (lacking := _lacking(cache, lists)) or _lacking(cache, _with_files(cache, wanted)):
            done.wanted = True
            remote = _remote(repo, pulse)
            _fetch_all(root, repo, remote, lacking, pulse, done)
            files = _with_files(cache, wanted)
            _fetch_all(root, repo, remote, _lacking(cache, files), pulse, done)
    return done


def push(root: Path, pulse: Pulse) -> Transfer:
    """Bring what dvc.lock names, and the run-cache, to the default remote, if it is not there.

    Each object is asked for, and replaced if its size is another one or if this clone found it
    damaged. The files of a folder go before its list: who sees the list counts on them.

    Raises:
        RemoteError: the remote refuses, is full, or cannot be reached; what was brought stays.
    """
    done = Transfer()
    with _opened(root) as repo:
        cache = repo.cache.local
        wanted = {out.hash_info.value: _name(root, out) for out in _outs(repo)}
        objects = _with_files(cache, wanted)
        remote = _remote(repo, pulse)
        damaged = _known_damaged(root)
        try:
            to_bring = []
            for oid, there in _each(partial(_size_on, remote, pulse), objects):
                here = Path(cache.oid_to_path(oid))
                if not here.is_file():
                    if there is None:
                        done.missing.append(objects[oid])
                elif there != here.stat().st_size or oid in damaged:
                    to_bring.append(oid)
            for part in ([o for o in to_bring if not _is_list(o)], filter(_is_list, to_bring)):
                for oid, size in _each(partial(_bring, cache, remote, pulse), part):
                    done.objects, done.bytes = done.objects + 1, done.bytes + size
                    damaged.discard(oid)
            _push_runs(repo, pulse)
        except Exception as error:  # of whatever speaks the remote's protocol
            done.failed = _reason(repo, error)
        finally:
            _remember_damaged(root, damaged)
    return done


@contextmanager
def _opened(root: Path) -> Iterator[Repo]:
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    repo = None
    try:
        with Repo(str(root)) as repo:
            yield repo
    except RemoteError:
        raise
    except DvcException as error:
        raise RemoteError("the remote failed", found=first_line(error)) from error
    except Exception as error:
        found = _reason(repo, error) if repo else first_line(error)
        raise RemoteError("the remote failed", found=found) from error


def _remote(repo: Repo, pulse: Pulse) -> Any:
    """Return the objects of the default remote, which has answered."""
    odb = repo.cloud.get_remote_odb(command="fetch")
    pulse.beat()
    # DVC takes each failure of a question for "it is not there"; listing the root raises.
    with suppress(FileNotFoundError):
        odb.fs.fs.ls(odb.fs.parent(odb.path.rstrip("/")), detail=False)
    pulse.beat()
    return odb


def _outs(repo: Repo) -> list[Any]:
    return [out for out in repo.index.outs if out.use_cache and out.hash_info]


def _name(root: Path, out: Any) -> str:
    path = Path(out.fs_path)
    return (
        str(path.relative_to(root.resolve())) if path.is_relative_to(root.resolve()) else str(path)
    )


def _stale_stages(repo: Repo) -> set[Any]:
    """Return the stages whose own inputs are not those of dvc.lock, and all after them."""
    import networkx as nx

    made = {out.fs_path for out in repo.index.outs}
    graph = repo.index.graph
    stale = {
        stage
        for stage in graph
        if stage.changed_stage()
        or any(dep.status() for dep in stage.deps if not _is_within(dep.fs_path, made))
    }
    return stale.union(*(nx.ancestors(graph, stage) for stage in stale))


def _is_within(path: str, made: set[str]) -> bool:
    return any(str(parent) in made for parent in (Path(path), *Path(path).parents))


def _is_list(oid: str) -> bool:
    return oid.endswith(".dir")


def _with_files(cache: Any, wanted: Mapping[str, str]) -> dict[str, str]:
    """Return objects with their paths: those of ``wanted``, and the files of its folders."""
    found = dict(wanted)
    for oid, name in wanted.items():
        if _is_list(oid):
            with suppress(OSError, ValueError, KeyError, TypeError):
                for entry in json.loads(Path(cache.oid_to_path(oid)).read_bytes()):
                    found.setdefault(entry["md5"], f"{name}/{entry['relpath']}")
    return found


def _lacking(cache: Any, objects: Mapping[str, str]) -> dict[str, str]:
    return {
        oid: name for oid, name in objects.items() if not Path(cache.oid_to_path(oid)).is_file()
    }


def _each(work: Callable[[str], T], keys: Iterable[str]) -> Iterator[tuple[str, T]]:
    """Yield what comes of each, in order, from several threads; the first failure ends it."""
    keys = list(keys)
    with ThreadPoolExecutor(_THREADS) as pool:
        futures = [pool.submit(work, key) for key in keys]
        try:
            for key, future in zip(keys, futures, strict=True):
                yield key, future.result()
        finally:
            for future in futures:
                future.cancel()


def _fetch_all(
    root: Path, repo: Repo, remote: Any, objects: Mapping[str, str], pulse: Pulse, done: Transfer
) -> None:
    # In the cache's own file system, so that a whole object gets its name at once.
    unfinished = Path(repo.cache.local.path).parent / "unfinished"
    unfinished.mkdir(parents=True, exist_ok=True)
    for left in unfinished.iterdir():  # by a run that was killed
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _DAY:
                left.unlink()
    damaged = _known_damaged(root)
    try:
        fetched = partial(_fetch_one, repo.cache.local, remote, unfinished, pulse)
        for oid, size in _each(fetched, objects):
            if size is None:
                done.missing.append(objects[oid])
            elif size < 0:
                done.damaged.append(objects[oid])
                damaged.add(oid)
            else:
                done.objects, done.bytes = done.objects + 1, done.bytes + size
    finally:
        _remember_damaged(root, damaged)


def _fetch_one(cache: Any, remote: Any, unfinished: Path, pulse: Pulse, oid: str) -> int | None:
    """Return the bytes of an object; None if the remote has none; -1 if it has another one."""
    from dvc_data.hashfile.hash import file_md5
    from fsspec.callbacks import Callback

    handle, name = tempfile.mkstemp(dir=unfinished)
    os.close(handle)
    path, place = Path(name), Path(cache.oid_to_path(oid))
    try:
        try:
            callback = Callback(hooks={"pulse": pulse.beat})
            remote.fs.fs.get_file(remote.oid_to_path(oid), name, callback=callback)
        except FileNotFoundError:
            return None
        pulse.beat()
        if file_md5(name) != oid.removesuffix(".dir"):
            return -1
        size = path.stat().st_size
        path.chmod(0o444)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
        return size
    finally:
        path.unlink(missing_ok=True)


def _size_on(remote: Any, pulse: Pulse, oid: str) -> int | None:
    try:
        size = remote.fs.fs.info(remote.oid_to_path(oid))["size"]
    except FileNotFoundError:
        size = None
    pulse.beat()
    return size


def _bring(cache: Any, remote: Any, pulse: Pulse, oid: str) -> int:
    """Upload an object, look whether it came whole, and return its bytes."""
    here, there = cache.oid_to_path(oid), remote.oid_to_path(oid)
    _put(remote.fs, here, there, pulse)
    size = Path(here).stat().st_size
    if (found := _size_on(remote, pulse, oid)) != size:
        raise RemoteError("the remote did not keep an object", expected=f"{size}", found=f"{found}")
    return size


def _put(fs: Any, here: str, there: str, pulse: Pulse) -> None:
    from fsspec.callbacks import Callback

    fs.makedirs(fs.parent(there), exist_ok=True)
    callback = Callback(hooks={"pulse": pulse.beat})
    fs.put_file(here, there, callback=callback, **_PARTS.get(fs.protocol, {}))
    pulse.beat()


def _push_runs(repo: Repo, pulse: Pulse) -> None:
    """Bring the entries of the run-cache that the remote lacks: DVC would bring all, each time."""
    local = repo.cache.legacy
    remote = repo.cloud.get_remote_odb(command="push", hash_name="md5-dos2unix")
    folder, there = Path(local.path) / "runs", remote.fs.join(remote.path, "runs")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    try:
        known = {remote.fs.relpath(path, there) for path in remote.fs.find(there)}
    except FileNotFoundError:
        known = set()
    pulse.beat()
    names = [path.relative_to(folder).as_posix() for path in paths]
    new = [name for name in names if name not in known]
    for _ in _each(
        lambda name: _put(remote.fs, str(folder / name), remote.fs.join(there, name), pulse), new
    ):
        pass


def _known_damaged(root: Path) -> set[str]:
    with suppress(OSError, ValueError):
        return set(json.loads((root / _DAMAGED).read_text()))
    return set()


def _remember_damaged(root: Path, oids: set[str]) -> None:
    if oids or (root / _DAMAGED).exists():
        write_json(root / _DAMAGED, sorted(oids))


def _reason(repo: Repo, error: BaseException) -> str:
    """Return the first line of an error, without anything that opens the remote."""
    text = first_line(error)
    settings: Sequence[Mapping[str, object]] = list(repo.config.get("remote", {}).values())
    for remote in settings:
        for key, value in remote.items():
            if key in _SECRETS and isinstance(value, str) and value:
                text = text.replace(value, "…")
    return text


_SECRETS = {
    *("password", "passphrase", "access_key_id", "secret_access_key", "session_token"),
    *("sse_customer_key", "connection_string", "account_key", "sas_token", "token"),
}
