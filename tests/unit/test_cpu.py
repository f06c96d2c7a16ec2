"""Fingerprints tell processors apart the same way, whoever was asked."""

from __future__ import annotations

from collections.abc import Iterator
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
