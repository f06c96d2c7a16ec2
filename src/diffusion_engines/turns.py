"""Stages of several runs on one machine take turns: what times something runs alone.

A sweep with several workers names a folder; every stage of theirs holds a lock in it while it
works. The kernel releases it with the process, however that ends.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The environment variable that names the folder.
TURNS = "DIFFUSION_ENGINES_TURNS"
_TIMED = ("benchmark", "generate")


@contextmanager
def turn(folder: Path | None, *, alone: bool) -> Iterator[float]:
    """Run a block when its turn has come; yield the seconds that it waited.

    Args:
        folder: of the locks; None: nobody else is there.
        alone: whether no other block may run meanwhile.
    """
    if folder is None:
        yield 0.0
        return
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "running").open("a") as running:
        # Who waits to be alone keeps the door, or others would come in as long as any is there.
        with (folder / "door").open("a") as door:
            fcntl.flock(door, fcntl.LOCK_EX)
            fcntl.flock(running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield time.monotonic() - started


def runs_alone(stage: str, config: Mapping[str, Any]) -> bool:
    """Whether a stage's result depends on what else runs: it times pictures, or kernels on a GPU.

    Args:
        stage: its script's name.
        config: its parameters, with selectors.
    """
    if stage in _TIMED:
        return True
    if stage != "build":
        return False
    from diffusion_engines.backends import backend
    from diffusion_engines.backends.targets import target_from_settings

    target = target_from_settings(config["targets"][config["engines"][config["engine"]]["target"]])
    return backend(target.backend).device(target) != "cpu"
