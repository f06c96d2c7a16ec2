"""Write requirements-hashes.txt from constraints.txt: the SHA-256 of every third-party file.

Run it with the environment's Python on Linux x86_64 after each change of constraints.txt. pip says
which file it would install, and hashes it. Left out is what is built for a CPU or a CUDA version
under one number, so that which file is right depends on the machine: PyTorch, torchvision.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
HASHES = ROOT / "requirements-hashes.txt"
LEFT_OUT = ("torch", "torchvision")
_HEADER = """\
# What was tested, by hash, on Python {version} and {machine}.
# Made by `python tools/hash_requirements.py`; to install it:
# `pip install --no-deps --require-hashes -r requirements-hashes.txt`, then {left_out} of
# constraints.txt from where you trust them, then `pip install --no-deps -e .`
"""


def main() -> None:
    wanted = requirements(CONSTRAINTS.read_text())
    lines = [
        f"{pin} --hash=sha256:{digest}" for pin, digest in zip(wanted, hashes(wanted), strict=True)
    ]
    header = _HEADER.format(
        version=".".join(map(str, sys.version_info[:2])),
        machine=f"{platform.system()} {platform.machine()}",
        left_out=" and ".join(LEFT_OUT),
    )
    HASHES.write_text(header + "\n".join(lines) + "\n")
    print(f"{HASHES.name}: {len(lines)} files")


def requirements(constraints: str) -> list[str]:
    """Return the pinned requirements of a constraints file that have a hash of their own."""
    pins = [line for line in constraints.splitlines() if line and not line.startswith("#")]
    return [pin for pin in pins if pin.partition("==")[0] not in LEFT_OUT]


def hashes(wanted: Sequence[str]) -> list[str]:
    """Return the SHA-256 of the file that pip installs for each requirement."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps"]
        subprocess.run(
            [*command, "--ignore-installed", "--report", str(report), *wanted], check=True
        )
        found = json.loads(report.read_text())["install"]
    digests = {
        canonicalize_name(one["metadata"]["name"]): one["download_info"]["archive_info"]["hashes"]
        for one in found
    }
    return [digests[canonicalize_name(pin.partition("==")[0])]["sha256"] for pin in wanted]


if __name__ == "__main__":
    main()
