"""Timing caches: how fast a builder found each kernel, kept between builds.

With one, a rebuild after a small change times only what changed, and chooses the same kernels
again for the rest. Each build reads the cache that its component's last build with the same
fingerprint left, and writes its own beside the engine; the stage `timing` collects those.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from diffusion_engines import manifests
from diffusion_engines.errors import BuildError
from diffusion_engines.files import new_folder

TIMING_CACHE = "timing.cache"


def find_timing_cache(kept: Path, component: str, fingerprint: Mapping[str, object]) -> Path | None:
    """Return the cache of an earlier build of a component with a fingerprint.

    Args:
        kept: the folder of the target's caches.
        component: such as ``unet``.
        fingerprint: of the build.
    """
    path = kept / fingerprint_key(fingerprint) / f"{component}.cache"
    return path if path.is_file() else None


def fingerprint_key(fingerprint: Mapping[str, object]) -> str:
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


def collect_timing_caches(kept: Path, engines: Mapping[str, Path]) -> None:
    """Add the caches beside a target's engines to those of earlier builds.

    Args:
        kept: the folder of the target's caches.
        engines: the folder of each engine, by component.

    Raises:
        IntegrityError: an engine is missing or damaged.
    """
    with new_folder(kept) as folder:
        for path in sorted(kept.glob("*/*")):
            copy = folder / path.relative_to(kept)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
        for component, engine in engines.items():
            manifest = manifests.read(engine, manifests.Engine)
            place = folder / fingerprint_key(manifest.fingerprint)
            place.mkdir(exist_ok=True)
            (place / "fingerprint.json").write_text(
                json.dumps(manifest.fingerprint, indent=2, sort_keys=True) + "\n"
            )
            (place / f"{component}.cache").write_bytes((engine / TIMING_CACHE).read_bytes())
