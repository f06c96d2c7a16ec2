"""The repository as DVC sees it, with parameters that nobody has written to params.yaml yet."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_engines.plan.reading import fast_lock

if TYPE_CHECKING:
    from dvc.repo import Repo


@dataclass(frozen=True)
class View:
    """A workspace under parameters.

    Attributes:
        root: of the repository.
        repo: DVC's, which reads ``params`` where it would read params.yaml.
        params: as DVC reads them.
    """

    root: Path
    repo: Repo
    params: Mapping[str, Any]


@contextmanager
def open_view(root: Path, params: str) -> Iterator[View]:
    """Open the repository in ``root`` as it would be if params.yaml had the text ``params``."""
    from dvc.fs import LocalFileSystem
    from dvc.repo import Repo
    from dvc.utils.serialize import parse_yaml

    root = root.resolve()
    files = LocalFileSystem()
    plain, replaced = files.open, root / "params.yaml"

    def open_file(path: str, mode: str = "r", **kwargs: Any) -> Any:
        # DVC names it relative to the current folder, too.
        if mode == "r" and Path(path).absolute() == replaced:
            return io.StringIO(params)
        return plain(path, mode, **kwargs)

    # Of this one object: a second copy of the workspace would have to be hashed anew, all of it.
    files.open = open_file
    with fast_lock(), Repo(str(root), fs=files) as repo:
        yield View(root, repo, parse_yaml(params, str(replaced)))
