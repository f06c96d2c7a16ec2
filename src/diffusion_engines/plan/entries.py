"""What DVC could restore instead of running a stage: its lock's entry, and those of its run-cache.

DVC's own rules (dvc/stage/cache.py of 3.67): an entry is for a command, dependencies, parameters
and the paths of outputs; of several entries for the same ones the newest counts; and all that it
names has to be in the cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from diffusion_engines.errors import ConfigError
from diffusion_engines.plan.contents import listing

if TYPE_CHECKING:
    from dvc.repo import Repo

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What an entry has to be for.

    Attributes:
        command: of the stage.
        deps: hashes by path; None where nobody knows one before the stages before have run.
        params: values by key.
        outs: their paths.
    """

    command: str
    deps: Mapping[str, str | None]
    params: Mapping[str, Any]
    outs: frozenset[str]


@dataclass
class Store:
    """The local cache with its entries, and the default remote's where ``pull`` asks for them."""

    repo: Repo
    pull: bool
    _found: dict[str, Any] = field(default_factory=dict)

    def holder(self, value: str) -> Any:
        """Return the object store that has all of what a hash stands for; None where none has."""
        if value not in self._found:
            self._found[value] = next((s for s in self.stores if _has(s, value)), None)
        return self._found[value]

    def is_remote(self, store: Any) -> bool:
        """Whether an object store is the remote."""
        return store is not self.repo.cache.local

    def newest(self, wanted: Wanted) -> list[Entry]:
        """Return the entries of the run-cache that a stage might be restored from.

        One for each set of inputs that is possible under ``wanted``: at most one, where all
        dependencies are known.
        """
        from dvc.utils.serialize import parse_yaml

        found = []
        for texts in self._runs.get(f"cmd: {wanted.command}", {}).values():
            text = texts[0]  # the newest
            if all(value in text for value in wanted.deps.values() if value is not None):
                entry = parse_yaml(text, "an entry of the run-cache")
                if _fits(entry, wanted):
                    found.append(entry)
        return found

    @cached_property
    def stores(self) -> list[Any]:
        """The object stores to look into, the local cache first.

        Raises:
            ConfigError: there is no remote.
        """
        local = self.repo.cache.local
        return [local, self._remote("md5")] if self.pull else [local]

    def _remote(self, hash_name: str) -> Any:
        from dvc.config import RemoteConfigError

        try:
            return self.repo.cloud.get_remote_odb(None, "plan", hash_name=hash_name)
        except RemoteConfigError as error:
            raise ConfigError(
                "there is no remote to restore from",
                expected="a default remote in .dvc/config",
                found="none",
                fix="`dvc remote add -d shared /mnt/engines`, or plan without --pull",
            ) from error

    @cached_property
    def _runs(self) -> dict[str, dict[str, list[str]]]:
        """The texts of all entries: by their command, and then by their key, newest first."""
        runs: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for key, text in self._texts():
            # YAML breaks long lines at spaces.
            runs[" ".join(text.partition("\ndeps:")[0].split())][key].append(text)
        return runs

    def _texts(self) -> Iterator[tuple[str, str]]:
        stores = [self.repo.cache.legacy]
        if self.pull:
            stores.append(self._remote("md5-dos2unix"))
        for store in stores:
            folder = store.fs.join(store.path, "runs")
            if not store.fs.exists(folder):
                continue
            paths = list(store.fs.find(folder))
            if store is self.repo.cache.legacy:
                paths.sort(key=lambda path: store.fs.info(path)["mtime"], reverse=True)
            for path in paths:
                with store.fs.open(path, encoding="utf-8") as file:
                    yield store.fs.name(store.fs.parent(path)), file.read()


def _has(store: Any, value: str) -> bool:
    files = listing(value, store)
    return files is not None and all(_is_whole(store, name) for name in {value, *files.values()})


def _is_whole(store: Any, name: str) -> bool:
    """Look at an object as DVC does before it takes it; but leave a damaged one where it is."""
    from dvc_data.hashfile.hash import hash_file

    path = store.oid_to_path(name)
    if not store.fs.exists(path):
        return False
    if store.fs.protocol != "local" or store.is_protected(path):
        return True  # DVC does not read it either
    _, found = hash_file(path, store.fs, "md5", store.state)
    return bool(found.value == name.removesuffix(".dir"))


def _fits(entry: Entry, wanted: Wanted) -> bool:
    deps = {dep["path"]: dep["md5"] for dep in entry.get("deps", [])}
    params = entry.get("params", {}).get("params.yaml", {})
    return (
        entry["cmd"] == wanted.command
        and deps.keys() == wanted.deps.keys()
        and all(value in (None, deps[path]) for path, value in wanted.deps.items())
        and params == wanted.params
        and {out["path"] for out in entry.get("outs", [])} == wanted.outs
    )
