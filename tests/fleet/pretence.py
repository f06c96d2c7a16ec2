"""A clone whose stages pretend, also in workers: processes of their own, on nodes of Slurm.

As tests/pipeline/pretence.py, and in addition a stage may take time, and may be for one node alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from diffusion_engines.failures import Failure
from diffusion_engines.files import text_from_json
from tests.pipeline.conftest import Clone, Outcome, environment, make_clone
from tests.pipeline.pretence import outputs_of

# Three targets that share graphs, and one whose GPU no machine here has.
FLEET = """\
# @package _global_
# The UNet for several targets; for tests.
defaults:
  - /target@targets.cpu: cpu
  - /target@targets.rtx: rtx40
  - /target@targets.blackwell: rtx50
  - /target@targets.a10: a10
  - /precision@fleet.cpu: fp32
  - /precision@fleet.rtx: fp16
  - /precision@fleet.blackwell: fp16
  - /precision@fleet.a10: fp16
fleet:
  cpu: {only: [unet]}
  rtx: {only: [unet]}
  blackwell: {only: [unet]}
  a10: {only: [unet]}
measure: [cpu]
"""
PYTHON = """\
import json, os, sys, time
with open(os.environ["PRETENCE"]) as file:
    pretence = json.load(file)
stage, node = os.environ["DVC_STAGE"], os.environ.get("SLURMD_NODENAME", "here")
def note(what):
    with open(pretence["ran"], "a") as file:
        file.write(f"{what} {stage} {node} {os.getpid()} {time.time()}\\n")
note("began")
needed = pretence["nodes"].get(stage)
if needed and needed != node:
    sys.exit(f"{stage} is for {needed}, and this is {node}")
if stage in pretence["fails"]:
    folder = os.environ["DIFFUSION_ENGINES_FAILURES"]
    with open(os.path.join(folder, f"{stage}.json"), "w") as file:
        file.write(pretence["fails"][stage])
    sys.exit(1)
time.sleep(pretence["seconds"].get(stage, 0))
for path, text in pretence["writes"][stage].items():
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write(text)
note("ended")
"""


@dataclass(frozen=True)
class Run:
    """A stage that a worker began."""

    stage: str
    node: str
    pid: int
    began: float
    ended: float | None


@dataclass(frozen=True)
class Pretended:
    """A clone in which the stages pretend."""

    clone: Clone
    folder: Path

    def pretend(
        self,
        seconds: Mapping[str, float] | None = None,
        nodes: Mapping[str, str] | None = None,
        fails: Sequence[Failure] = (),
    ) -> None:
        """Say how stages behave from now on, of params.yaml as it is now."""
        from dvc.repo import Repo

        root = self.clone.path
        before = Path.cwd()
        os.chdir(root)
        try:
            with Repo(str(root)) as repo:
                writes = outputs_of(repo, root)
        finally:
            os.chdir(before)
        for name, made in (("", {"gpu": "A10"}), ("-wrap", {})):
            if "probe@a10" in writes:
                writes["probe@a10"].pop("", None)
                path = f"artifacts/fingerprints/a10{name}.json"
                writes["probe@a10"][path] = text_from_json(made)
        content = {
            "ran": str(self.folder / "ran"),
            "writes": writes,
            "seconds": dict(seconds or {}),
            "nodes": dict(nodes or {}),
            "fails": {failure.stage: text_from_json(asdict(failure)) for failure in fails},
        }
        (self.folder / "pretence.json").write_text(json.dumps(content))

    @property
    def env(self) -> dict[str, str]:
        """Of the fleet command."""
        kept = environment()
        return kept | {
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{kept['PATH']}",
            "PRETENCE": str(self.folder / "pretence.json"),
            "SHELL": "/bin/sh",
        }

    def fleet(self, *arguments: str, check: bool = True) -> Outcome:
        """Run the command to its end."""
        return self.clone.run("diffusion-engines", "fleet", *arguments, check=check, env=self.env)

    @contextmanager
    def started(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Run the command beside a block, at whose end it is ended."""
        with subprocess.Popen(
            ["diffusion-engines", "fleet", *arguments],
            cwd=self.clone.path,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        ) as command:
            try:
                yield command
            finally:
                command.kill()

    def runs(self) -> list[Run]:
        """Return what the stages noted, in the order in which they began."""
        path = self.folder / "ran"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        ended = {(stage, pid): float(at) for what, stage, _, pid, at in lines if what == "ended"}
        return [
            Run(stage, node, int(pid), float(at), ended.get((stage, pid)))
            for what, stage, node, pid, at in lines
            if what == "began"
        ]

    def stages(self) -> list[str]:
        """Return what ran, but for probes, sorted: a stage that ran twice is there twice."""
        return sorted(run.stage for run in self.runs() if not run.stage.startswith("probe"))

    def forget(self) -> None:
        """Note from now on only."""
        (self.folder / "ran").unlink(missing_ok=True)

    def wait_for(self, stage: str, seconds: float = 240) -> Run:
        """Return a stage once it has begun."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := [run for run in self.runs() if run.stage == stage]:
                return found[-1]
            time.sleep(0.1)
        raise AssertionError(f"{stage} has not begun in {seconds} s: {self.runs()}")


def make_pretended(folder: Path, *overrides: str, fleet: str = FLEET) -> Pretended:
    """Make a clone below a folder, composed with overrides and committed."""
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin/python"
    python.write_text(f"#!{sys.executable} -SE\n{PYTHON}")
    python.chmod(0o755)
    clone = make_clone(folder / "clone")
    for heavy in ("docs", "models/lemon"):
        shutil.rmtree(clone.path / heavy)
    (clone.path / "conf/fleet/small.yaml").write_text(fleet)
    clone.compose(*overrides)
    clone.commit()
    made = Pretended(clone, folder)
    made.pretend()
    return made


def states(output: str) -> dict[str, str]:
    """The table at the end."""
    rows = re.findall(r"^│ (\S+) +│ ([a-z ]+?) +│", output, re.MULTILINE)
    return dict(rows)
