"""Timing caches: how fast TensorRT found each kernel, kept between builds.

With one, a rebuild after a small change times only what changed, and chooses the same kernels
again for the rest. Each build reads the cache that its component's last build with the same
fingerprint left, and writes its own beside the engine; the stage `timing` collects those.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffusion_engines import layout
from diffusion_engines.errors import BuildError
from diffusion_engines.files import new_folder, read_manifest

TIMING_CACHE = "timing.cache"


def find_timing_cache(target: str, component: str, fingerprint: Mapping[str, Any]) -> Path | None:
    """Return the cache of an earlier build of a component with a fingerprint."""
    path = layout.timing(target) / fingerprint_key(fingerprint) / f"{component}.cache"
    return path if path.is_file() else None


def fingerprint_key(fingerprint: Mapping[str, Any]) -> str:
    """Return a short name for a fingerprint: timings of another GPU or release are worthless."""
    text = json.dumps(fingerprint, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_timing_cache(path: Path, builder: str) -> None:
    """Raise BuildError where a builder was asked for a timing cache and wrote none."""
    if not path.is_file() or path.stat().st_size == 0:
        raise BuildError(
            f"{builder} wrote no timing cache",
            expected=str(path),
            found="an empty file" if path.is_file() else "nothing",
            fix="set targets.*.build.timing_cache=false if this TensorRT cannot",
        )


def collect_timing_caches(target: str, components: Iterable[str]) -> None:
    """Add the caches beside a target's engines to those of earlier builds.

    Raises:
        IntegrityError: an engine is missing or damaged.
    """
    earlier = layout.timing(target)
    with new_folder(earlier) as folder:
        for path in sorted(earlier.glob("*/*")):
            copy = folder / path.relative_to(earlier)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
        for component in components:
            engine = layout.engine(target, component)
            manifest = read_manifest(engine, "engine")
            place = folder / fingerprint_key(manifest["fingerprint"])
            place.mkdir(exist_ok=True)
            (place / "fingerprint.json").write_text(
                json.dumps(manifest["fingerprint"], indent=2, sort_keys=True) + "\n"
            )
            (place / f"{component}.cache").write_bytes((engine / TIMING_CACHE).read_bytes())
