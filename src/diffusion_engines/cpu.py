"""This machine's processor: its name, its instructions, and how much of it this process may use."""

from __future__ import annotations

import functools
import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

CPUINFO = Path("/proc/cpuinfo")
TOPOLOGY = Path("/sys/devices/system/cpu")
OWN_CGROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


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


def usable_cores() -> int:
    """Return how many threads this process can keep busy: one for each core that it may use.

    Counted are the cores of its affinity (`taskset`, cpusets), the hardware threads of one as one,
    up to the quota of its control groups (`docker run --cpus`), rounded up.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = {_siblings(cpu) for cpu in os.sched_getaffinity(0)}
    else:  # not Linux
        cores = {str(cpu) for cpu in range(os.cpu_count() or 1)}
    return max(1, min([len(cores), *(math.ceil(quota) for quota in _quotas())]))


def _siblings(cpu: int) -> str:
    """Return the hardware threads of a thread's core, as the kernel lists them."""
    path = TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list"
    return path.read_text().strip() if path.is_file() else str(cpu)


def _quotas() -> Iterator[float]:
    """Yield the quotas, in cores, of the control groups that this process is in.

    https://docs.kernel.org/admin-guide/cgroup-v2.html, and version 1 in
    https://docs.kernel.org/scheduler/sched-bwc.html
    """
    if not OWN_CGROUPS.is_file():
        return
    for line in OWN_CGROUPS.read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        own = PurePosixPath(group.lstrip("/"))
        for path in (own, *own.parents):  # each limits those below it
            if not controllers:
                maximum = CGROUPS / path / "cpu.max"
                quota, period = maximum.read_text().split() if maximum.is_file() else ("max", "1")
            elif "cpu" in controllers.split(","):
                folder = CGROUPS / "cpu" / path
                files = [folder / f"cpu.cfs_{name}_us" for name in ("quota", "period")]
                if not all(file.is_file() for file in files):
                    continue
                quota, period = (file.read_text().strip() for file in files)
            else:
                break
            if quota not in ("max", "-1"):
                yield int(quota) / int(period)
