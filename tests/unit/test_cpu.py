"""Fingerprints tell processors apart the same way, and threads are as many as can run at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import cpuinfo
import pytest

from diffusion_engines import cpu
from diffusion_engines.cpu import instruction_set

X86 = """\
processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD Ryzen 7: eight cores
flags\t\t: fpu ssse3 sse4_2 avx2
power management:

processor\t: 1
model name\t: another one
flags\t\t: fpu
"""
ARM = """\
processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd evtstrm aes
"""


@pytest.fixture(autouse=True)
def _ask_anew() -> Iterator[None]:
    cpu.this_cpu.cache_clear()
    yield
    cpu.this_cpu.cache_clear()


def test_the_kernel_is_asked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(X86)
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: pytest.fail("it takes a second"))

    assert cpu.this_cpu() == cpu.Cpu(
        "AMD Ryzen 7: eight cores", frozenset({"fpu", "ssse3", "sse4_2", "avx2"})
    )


@pytest.mark.parametrize("text", [ARM, None], ids=["names it otherwise", "not Linux"])
def test_py_cpuinfo_where_the_kernel_does_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    if text:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(
        cpuinfo, "get_cpu_info", lambda: {"brand_raw": "Apple M5", "flags": ["asimd"]}
    )

    assert cpu.this_cpu() == cpu.Cpu("Apple M5", frozenset({"asimd"}))


def test_both_agree_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or engines in a remote, built before, would not be found any more."""
    asked, level = cpu.this_cpu(), instruction_set()
    cpu.this_cpu.cache_clear()
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "absent")

    assert cpu.this_cpu().name == asked.name
    assert cpu.this_cpu().flags >= asked.flags
    assert instruction_set() == level


V2, V1 = "0::/pod/box\n", "4:memory:/\n2:cpu,cpuacct:/box\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (None, {}, 4),  # not Linux
        (V2, {}, 4),
        (V2, {"pod/box/cpu.max": "max 100000"}, 4),
        (V2, {"pod/box/cpu.max": "150000 100000"}, 2),
        (V2, {"pod/cpu.max": "100000 100000", "pod/box/cpu.max": "300000 100000"}, 1),
        (V2, {"pod/box/cpu.max": "10000 100000"}, 1),  # a tenth of a core
        (V2, {"pod/box/cpu.max": "6400000 100000"}, 4),
        (V1, {"cpu/box/cpu.cfs_quota_us": "-1", "cpu/box/cpu.cfs_period_us": "100000"}, 4),
        (V1, {"cpu/box/cpu.cfs_quota_us": "250000", "cpu/box/cpu.cfs_period_us": "100000"}, 3),
    ],
)
def test_threads_follow_affinity_hyperthreads_and_quota(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    groups: str | None,
    files: Mapping[str, str],
    expected: int,
) -> None:
    """Of eight hardware threads in four cores."""
    for number in range(8):
        folder = tmp_path / f"cpus/cpu{number}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{number % 4},{number % 4 + 4}\n")
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    if groups is not None:
        (tmp_path / "own").write_text(groups)
    monkeypatch.setattr(cpu, "TOPOLOGY", tmp_path / "cpus")
    monkeypatch.setattr(cpu, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(cpu, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert cpu.usable_cores() == expected
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 4})  # one core's two
    assert cpu.usable_cores() == 1
