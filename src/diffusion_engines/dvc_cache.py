"""DVC's cache on this machine: how it is set up."""

from __future__ import annotations

from pathlib import Path

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
