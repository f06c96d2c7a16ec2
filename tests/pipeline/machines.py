"""Other machines than this one, for tests: what its library sees of the hardware is changed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_SITE = """\
import dataclasses, os
from diffusion_engines import cpu
_cpu, _cores = cpu.this_cpu(), {cores}
_other = dataclasses.replace(_cpu, {cpu})
cpu.this_cpu = lambda: _other
if _cores is not None:
    os.sched_getaffinity = lambda pid: set(range(_cores))
"""


@dataclass(frozen=True)
class Machine:
    """A machine that differs from this one in its processor or the number of cores."""

    cpu: str = ""  # fields of cpu.Cpu as keyword arguments
    cores: int | None = None

    def env(self, folder: Path) -> dict[str, str]:
        """Return the variables under which Python takes this machine for that one."""
        site = folder / f"machine-{abs(hash(self))}"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(_SITE.format(cpu=self.cpu, cores=self.cores))
        return {"PYTHONPATH": os.pathsep.join(["src", str(site)])}
