"""DVC's cache on this machine: how it is set up, and what it calls a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_engines.errors import ConfigError

_LINKS = ("symlink", "hardlink")


def refuse_links(root: Path) -> None:
    """Return if DVC puts copies into the workspace, or clones that share no name.

    onnx 1.21 and later refuse weights that lie behind a link.

    Args:
        root: of the repository.

    Raises:
        ConfigError: ``cache.type`` lets DVC link.
    """
    from dvc.config import Config
    from dvc.config import ConfigError as DvcConfigError

    try:
        kinds = Config(dvc_dir=str(root / ".dvc"))["cache"].get("type") or []
    except DvcConfigError as error:
        raise ConfigError("DVC's configuration cannot be read", found=str(error)) from error
    if links := [kind for kind in kinds if kind in _LINKS]:
        raise ConfigError(
            f"DVC's cache.type is {','.join(kinds)}: onnx refuses weights behind a "
            f"{' or a '.join(links)}, so that no engine could be built from them",
            expected="reflink,copy, as in .dvc/config",
            found=",".join(kinds),
            fix="`dvc config --local --unset cache.type`, then `dvc checkout --relink`",
        )


def cache_folder(root: Path) -> Path:
    """Return where a repository's cache is."""
    from dvc.config import Config

    folder = Config(dvc_dir=str(root / ".dvc"))["cache"].get("dir")
    return Path(folder) if folder else root.resolve() / ".dvc" / "cache"


def share_cache(root: Path, clone: Path) -> None:
    """Give a clone on this machine a repository's cache and remotes, as they are set up there.

    Args:
        root: of the repository.
        clone: root of the clone, whose ``.dvc/config.local`` is written.
    """
    from dvc.config import Config

    ours: Any = Config(dvc_dir=str(root / ".dvc"))
    with Config(dvc_dir=str(clone / ".dvc")).edit("local") as local:
        # As read: where a path is relative, to the file that it stands in.
        for section in ("core", "remote"):
            local[section] = {**ours[section]}
        local["cache"] = {**ours["cache"], "dir": str(cache_folder(root))}
    # It may hold a password.
    (clone / ".dvc/config.local").chmod(0o600)


def tree_of(files: Mapping[str, str]) -> Any:
    """Return DVC's list of a folder's files, under the hash that stands for all of them.

    Args:
        files: MD5 by path, relative to the folder.
    """
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    tree: Any = Tree()  # type: ignore[no-untyped-call]
    for name, value in files.items():
        tree.add(tuple(name.split("/")), None, HashInfo("md5", value))
    tree.digest()
    return tree


def tree_of_folder(folder: Path) -> Any:
    """Return DVC's list of a folder's files, hashed from their bytes."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return tree_of({path.relative_to(folder).as_posix(): md5_of_file(path) for path in files})


def md5_of_file(path: Path) -> str:
    """Return what DVC's cache calls a file, by its bytes."""
    from dvc_data.hashfile.hash import file_md5

    return file_md5(str(path))
