"""The profiles of a release for people, as ``diffusion-engines profiles`` prints them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from diffusion_engines.machines import describe
from diffusion_engines.release.choosing import Considered, consider
from diffusion_engines.release.profiles import Timing
from diffusion_engines.wording import console


def print_profiles(release: Path) -> None:
    """Print the profiles of a release, the one that this machine takes first."""
    console(160).print(profiles_table(consider(release)))


def profiles_table(considered: Sequence[Considered]) -> Table:
    """Return a row per profile, the preferred first, with the reason where it cannot be loaded."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("profile", "backend", "precision", "a picture", "timed on", "on this machine"):
        table.add_column(name, justify="right" if name == "a picture" else "left")
    for one in considered:
        profile = one.profile
        table.add_row(
            profile.target,
            profile.backend,
            ", ".join(sorted(set(profile.precisions.values()))),
            *_timing(profile.timing),
            "can be loaded" if one.reason is None else one.reason,
        )
    return table


def _timing(timing: Timing | None) -> tuple[str, str]:
    if timing is None:
        return "not timed", ""
    return f"{timing.picture_ms:,.0f} ms, {timing.steps} steps", describe(timing.machine)
