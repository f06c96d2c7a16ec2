"""How a fleet is built: the group ``conf/launcher/``, which is no part of params.yaml.

Where a job runs changes no hash: ``conf_digest`` leaves the group out, and so does .dvcignore.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from diffusion_engines.backends.base import STRICT
from diffusion_engines.config import LAUNCHER, PositiveInt, values_from_config
from diffusion_engines.errors import ConfigError


@dataclass(config=STRICT)
class Local:
    """This machine.

    Attributes:
        jobs: how many targets are built at the same time.
    """

    kind: Literal["local"]
    jobs: PositiveInt


@dataclass(config=STRICT)
class Request:
    """What a job asks Slurm for; what is None is left to the cluster, or to the default.

    Attributes:
        partition: to queue in.
        constraint: features that the node has.
        gres: generic resources, such as ``gpu:a10:1``.
        minutes: after which Slurm ends it.
        cpus: that it gets.
        memory_gb: that it gets.
    """

    partition: str | None = None
    constraint: str | None = None
    gres: str | None = None
    minutes: PositiveInt | None = None
    cpus: PositiveInt | None = None
    memory_gb: PositiveInt | None = None


@dataclass(config=STRICT)
class Slurm:
    """A Slurm cluster whose nodes see this folder and DVC's cache.

    Attributes:
        patience_seconds: how long a worker may say nothing, and a job wait for nodes that are down.
        default: of every target.
        targets: what single ones ask for, by name.
    """

    kind: Literal["slurm"]
    patience_seconds: Annotated[float, Field(gt=0)]
    default: Request
    targets: dict[str, Request]

    def request(self, target: str) -> Request:
        """Return what a target's job asks for."""
        own = self.targets.get(target, Request())
        chosen = {}
        for field in fields(Request):
            value = getattr(own, field.name)
            chosen[field.name] = getattr(self.default, field.name) if value is None else value
        return Request(**chosen)


Launcher = Local | Slurm
_KINDS: dict[str, type[Any]] = {"local": Local, "slurm": Slurm}
_KEYS = {field.name for kind in _KINDS.values() for field in fields(kind)}


def launcher_from_overrides(conf: Path, overrides: Sequence[str]) -> tuple[Launcher, list[str]]:
    """Return how to build, and the overrides that are of params.yaml.

    Args:
        conf: the folder ``conf/``.
        overrides: Hydra's. ``launcher=slurm`` chooses the option, ``launcher.…`` or a key of it
            alone, such as ``jobs=2``, changes it.

    Raises:
        ConfigError: there is no such launcher, or a key is unknown or of the wrong type.
    """
    from dvc.utils.hydra import load_hydra_plugins
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    own = [o for o in overrides if re.split(r"[.=]", o, maxsplit=1)[0] in _OWN]
    rest = [override for override in overrides if override not in own]
    chosen = ([o.partition("=")[2] for o in own if o.startswith(f"{LAUNCHER}=")] or ["local"])[-1]
    # Each may be new, as a target's: what is unknown is found below.
    changes = [
        f"++{o}" if o.startswith(f"{LAUNCHER}.") else f"++{LAUNCHER}.{o}"
        for o in own
        if not o.startswith(f"{LAUNCHER}=")
    ]
    # Hydra looks for plugins once in a process: those that params.yaml needs are to be found then.
    load_hydra_plugins(str(conf.resolve().parent))
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf.resolve()), version_base=None):
            composed = OmegaConf.to_container(
                compose(None, [f"+{LAUNCHER}={chosen}", *changes]), resolve=True
            )
    except HydraException as error:
        raise ConfigError(
            "the launcher cannot be composed",
            found=str(error),
            fix=f"correct conf/{LAUNCHER}/ or the override",
        ) from error
    assert isinstance(composed, dict)
    found = composed[LAUNCHER].get("kind")
    if found not in _KINDS:
        raise ConfigError(
            f"conf/{LAUNCHER}/{chosen}.yaml: kind",
            expected=" or ".join(_KINDS),
            found=str(found),
        )
    values = values_from_config(
        {str(key): value for key, value in composed.items()}, {"it": (LAUNCHER, _KINDS[found])}
    )
    return values["it"], rest


_OWN = {LAUNCHER, *_KEYS} - {"kind", "default", "targets"}
