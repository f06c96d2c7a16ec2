"""This machine's processor: its name, and the instructions that it can execute."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Cpu:
    """A processor: its vendor's name for it, and its flags as Linux names them (`avx512f`)."""

    name: str
    flags: frozenset[str]


@functools.cache
def this_cpu() -> Cpu:
    """Ask the kernel, which knows on x86 Linux; py-cpuinfo elsewhere.

    py-cpuinfo begins with the same file, and then takes a second to look further: two of the nine
    that `dvc repro` takes when nothing changed.
    """
    if CPUINFO.is_file():
        first, _, _ = CPUINFO.read_text().partition("\n\n")
        fields = {
            name.strip(): value.strip()
            for name, _, value in (line.partition(":") for line in first.splitlines())
        }
        if "model name" in fields and "flags" in fields:
            return Cpu(fields["model name"], frozenset(fields["flags"].split()))
    import cpuinfo

    found = cpuinfo.get_cpu_info()
    return Cpu(found.get("brand_raw", platform.processor()), frozenset(found.get("flags", [])))
