"""Say what a garbage collection would drop, and ask whether it may."""

from __future__ import annotations

import re
import sys
from collections import defaultdict

from rich.table import Table

from diffusion_engines.errors import ConfigError
from diffusion_engines.garbage.collecting import Collection
from diffusion_engines.wording import console

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def bytes_from_text(text: str) -> int:
    """Return the bytes of a size such as ``200GB`` or ``1.5 TB``; units are powers of ten.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ConfigError(
            "the budget is not a size", expected="as in 200GB, 500MB or 1.5TB", found=text
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def print_collection(found: Collection, budget: int | None) -> None:
    """Print what is there, who is known to need it, and what would be dropped."""
    print(f"{found.where}: {found.bytes / 1e9:,.2f} GB, {found.unneeded / 1e9:,.2f} GB not needed")
    for lease in found.leases:
        print(f"  kept for {lease.where}, as of {lease.written}")
    if not found.leases:
        print("  no other clone has left a lease: what only others need is not known")
    if found.young:
        print(f"  {found.young / 1e9:,.2f} GB of that is too young: a push may be under way")
    left = found.bytes - found.freed
    if budget is not None and left > budget:
        print(f"  {left / 1e9:,.2f} GB stay, which is over the budget of {budget / 1e9:,.2f} GB")
    if not found.drop:
        print("Nothing is to be dropped.")
        return
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for one in found.drop:
        of = sums[one.output or "of no output that the run-cache knows"]
        of[0] += 1
        of[1] += one.bytes
    table = Table()
    table.add_column("to be dropped: states of")
    table.add_column("objects", justify="right")
    table.add_column("MB", justify="right")
    for output, (objects, size) in sorted(sums.items(), key=lambda item: -item[1][1]):
        table.add_row(output, str(objects), f"{size / 1e6:,.1f}")
    console().print(table)
    print(f"{len(found.drop)} objects, {found.freed / 1e9:,.2f} GB.")


def agrees(found: Collection) -> bool:
    """Ask a person.

    Raises:
        ConfigError: there is none to be asked.
    """
    if not sys.stdin.isatty():
        raise ConfigError(
            "nothing was dropped: there is nobody to be asked",
            expected="a terminal",
            found="standard input that is none",
            fix="look at what would go, above, then add --yes",
        )
    return input(f"Drop {found.freed / 1e9:,.2f} GB? [y/N] ").strip().lower() in ("y", "yes")
