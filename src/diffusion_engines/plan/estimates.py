"""How long stages take and how much they write, by what they took and wrote last time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffusion_engines.plan.contents import listing
from diffusion_engines.plan.view import View
from diffusion_engines.why import run_file, run_from_json

if TYPE_CHECKING:
    from dvc.stage import PipelineStage


@dataclass(frozen=True)
class Estimate:
    """What a stage took the last time; None where that is not known.

    Attributes:
        seconds: from the start of its process to its end, on whichever machine that was.
        bytes: that its outputs have.
    """

    seconds: float | None
    bytes: int | None


def estimate(view: View, stage: PipelineStage) -> Estimate:
    """Return what a stage took when its entry in dvc.lock was made."""
    sizes = [out.meta.size for out in stage.outs if out.hash_info]
    known = [size for size in sizes if size is not None]
    return Estimate(_seconds(view, stage), sum(known) if known else None)


def _seconds(view: View, stage: PipelineStage) -> float | None:
    path = run_file(stage.name, view.root)
    folder = path.parent.relative_to(view.root).as_posix()
    cache = view.repo.cache.local
    for out in stage.outs:
        if out.def_path == folder and out.hash_info:
            value = (listing(out.hash_info.value, cache) or {}).get(path.name)
            if value and cache.exists(value):
                text = cache.fs.read_text(cache.oid_to_path(value))
                run = run_from_json(json.loads(text))
                return run.seconds if run else None
    return None
