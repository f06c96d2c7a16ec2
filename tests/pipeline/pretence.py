"""A clone in which DVC runs for real and the stages only pretend: the whole DAG in two seconds.

What a plan says is about DVC: what it runs, restores and leaves alone. So that each kind of change
can be tried, a double of `python` stands in for the stages' scripts. It writes every output, either
the bytes that it wrote before, or others.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import runpy
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO
from unittest import mock

import yaml

from diffusion_engines.config import params_from_config
from diffusion_engines.errors import HardwareError
from diffusion_engines.files import text_from_json
from diffusion_engines.plan.checks import NEW, written_by
from diffusion_engines.why import Run, write_run

PYTHON = """\
import json, os
with open(os.environ["PRETENCE"]) as file:
    pretence = json.load(file)
stage = os.environ["DVC_STAGE"]
with open(pretence["ran"], "a") as file:
    file.write(stage + "\\n")
for path, text in pretence["writes"][stage].items():
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write(text)
"""
SECONDS = 10.0


@dataclass
class Reproduced:
    """What `dvc repro` did: the stages that it ran and restored."""

    ran: set[str] = field(default_factory=set)
    restored: set[str] = field(default_factory=set)


def install_python(folder: Path) -> None:
    """Put the double on PATH, in ``folder``."""
    folder.mkdir()
    python = folder / "python"
    python.write_text(f"#!{sys.executable} -SE\n{PYTHON}")
    python.chmod(0o755)


def compose_in(root: Path) -> None:
    """From now on compose in this process as one of its own would in ``root``.

    Hydra otherwise keeps the plugins that it found first, with the folder that they belong to.
    """
    from dvc.utils.hydra import load_hydra_plugins

    load_hydra_plugins(str(root))
    for plugin in sorted((root / "hydra_plugins").glob("*.py")):
        runpy.run_path(str(plugin))


def reproduce(
    root: Path, *, other: str = "", asked: Collection[str] = (), pull: bool = False
) -> Reproduced:
    """Run `dvc repro --keep-going` in the current folder; ``other``: what to add to each output."""
    from dvc.exceptions import ReproductionError
    from dvc.repo import Repo

    done, folder = Reproduced(), root / ".dvc/tmp"
    ran, pretence = folder / "ran", folder / "pretence.json"
    ran.unlink(missing_ok=True)
    heard = _Heard(done)
    logger = logging.getLogger("dvc.stage.cache")
    logger.addHandler(heard)
    path = f"{root.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    variables = {"PRETENCE": str(pretence), "PATH": path, "SHELL": "/bin/sh"}
    try:
        with Repo(str(root)) as repo, mock.patch.dict(os.environ, variables), _fast_yaml():
            writes = outputs_of(repo, root, other, asked)
            pretence.write_text(json.dumps({"ran": str(ran), "writes": writes}))
            repo.reproduce(on_error="keep-going", pull=pull)
    except ReproductionError:
        pass  # which stages failed is what the test looks at
    finally:
        logger.removeHandler(heard)
    done.ran = set(ran.read_text().split()) if ran.exists() else set()
    return done


def _run_json() -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        write_run(path, Run(SECONDS, []))
        return path.read_text()


@contextmanager
def _fast_yaml() -> Iterator[None]:
    """Spare DVC from reading the same YAML over and over, and from writing it in pure Python.

    That is nine tenths of what it does where stages take no time.
    """
    from dvc.utils.serialize import _yaml

    plain, known = _yaml.parse_yaml, {}

    def parse(text: str, path: str, typ: str = "safe") -> object:
        if text not in known:
            known[text] = plain(text, path, "safe")
        return copy.deepcopy(known[text])

    def dump(data: object, stream: TextIO) -> None:
        ordered = json.loads(json.dumps(data))
        text = yaml.dump(ordered, Dumper=yaml.CSafeDumper, sort_keys=False)
        known[text] = ordered
        stream.write(text)

    with mock.patch.multiple(_yaml, parse_yaml=parse, _dump=dump):
        yield


class _Heard(logging.Handler):
    def __init__(self, done: Reproduced) -> None:
        super().__init__(logging.INFO)
        self.done = done

    def emit(self, record: logging.LogRecord) -> None:
        if "is cached - skipping run" in record.msg:
            found = re.fullmatch(r"Stage '([^']+)' is cached - .*", record.getMessage())
            assert found
            self.done.restored.add(found[1])


def outputs_of(
    repo: object, root: Path, other: str = "", asked: Collection[str] = ()
) -> dict[str, dict[str, str]]:
    """Return for each stage the files that it writes, so that all that others need is there."""
    stages = repo.index.stages  # type: ignore[attr-defined]
    needed = sorted({dep.def_path for stage in stages for dep in stage.deps})
    targets = params_from_config(yaml.safe_load((root / "params.yaml").read_text()))["targets"]
    writes: dict[str, dict[str, str]] = {}
    for stage in stages:
        files: dict[str, str] = {}
        for out in (out.def_path for out in stage.outs):
            below = [path for path in needed if path.startswith(f"{out}/")]
            for path in [out, *below]:
                file = path if "." in Path(path).name else f"{path}/content"
                files[file] = f"{stage.name} wrote {path}{other}"
            if out.startswith("artifacts/logs/"):
                files[f"{out}/run.json"] = _run_json()
        try:
            if check := written_by(stage.name, root, targets, asked):
                files = {
                    path: text_from_json({"time": time.time_ns()} if value == NEW else value)
                    for path, value in check.values.items()
                    if value is not None
                }
        except HardwareError:
            files = {"": ""}  # no such file can be written: the stage fails
        writes[stage.name] = files
    return writes
