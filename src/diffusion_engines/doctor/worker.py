"""Run one check: ``python -m diffusion_engines.doctor.worker NAME FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

from diffusion_engines.doctor.checks import CHECKS
from diffusion_engines.doctor.running import run_one

if __name__ == "__main__":
    name, folder = sys.argv[1:]
    run_one(next(check for check in CHECKS if check.name == name), Path(folder))
