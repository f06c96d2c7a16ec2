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


def instruction_set() -> str:
    """Return the CPU's instruction set, as coarse as code generation needs it.

    x86-64 is told apart by its micro-architecture levels (v2: SSE4.2, v3: AVX2, v4: AVX-512), so
    that two laptops of about the same age share engines.
    """
    machine = platform.machine().lower()
    if machine not in ("x86_64", "amd64"):
        return machine
    flags = this_cpu().flags
    levels = (
        ("x86-64-v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
        ("x86-64-v3", {"avx2", "bmi2", "fma"}),
        ("x86-64-v2", {"sse4_2", "ssse3"}),
    )
    return next((level for level, needed in levels if needed <= flags), "x86-64")
