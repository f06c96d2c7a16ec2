"""Six targets on two nodes of Slurm, and one after the other: ``python -m tests.fleet.bench 40``.

A build takes the seconds given, and no processor: it stands for one that waits for a GPU. All else
is real: composition, plans, clones, DVC, submitit, Slurm, merges.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from tests.fleet.pretence import Pretended, make_pretended
from tests.fleet.slurm import cluster

TARGETS = [f"t{number}" for number in range(1, 7)]
FLEET = "\n".join(
    [
        "# @package _global_",
        "# Six targets of one kind; for a measurement.",
        "defaults:",
        *(f"  - /target@targets.{name}: rtx40" for name in TARGETS),
        *(f"  - /precision@fleet.{name}: fp16" for name in TARGETS),
        "fleet:",
        *(f"  {name}: {{only: [unet]}}" for name in TARGETS),
        "measure: []\n",
    ]
)
LAUNCHER = """\
# Two virtual nodes.
kind: slurm
patience_seconds: 45
default: {partition: null, constraint: null, gres: null, minutes: 30, cpus: 1, memory_gb: null}
targets: {}
"""


def main() -> None:
    """Print the seconds of both, from nothing and with what all share made before."""
    seconds = float(sys.argv[1])
    with tempfile.TemporaryDirectory(prefix="f") as name:
        folder = Path(name)
        (folder / "slurm").mkdir()
        with cluster(folder / "slurm", {"node1": "a", "node2": "b"}) as nodes:
            os.environ |= nodes.env
            one = _timed(_made(folder / "one", seconds), "jobs=1")
            two = _timed(_made(folder / "two", seconds), "launcher=slurm")
    print(f"one after the other {one:.0f} s, two nodes {two:.0f} s: {one / two:.2f} times as fast")


def _made(folder: Path, seconds: float) -> Pretended:
    made = make_pretended(folder, fleet=FLEET)
    (made.clone.path / "conf/launcher/slurm.yaml").write_text(LAUNCHER)
    made.pretend(seconds={f"build@{target}-unet": seconds for target in TARGETS})
    return made


def _timed(made: Pretended, launcher: str) -> float:
    began = time.monotonic()
    print(made.fleet(launcher).output, flush=True)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
