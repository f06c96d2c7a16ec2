"""Checks of a doctor that end in every way that a process can."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from diffusion_engines.doctor.findings import Check, Finding, missing, passed
from diffusion_engines.doctor.running import run_one
from diffusion_engines.errors import BuildError


def crash(folder: Path) -> Finding:
    print("loading the library", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    return passed("never")


def hang(folder: Path) -> Finding:
    time.sleep(60)
    return passed("never")


def refuse(folder: Path) -> Finding:
    raise BuildError("no such layer", expected="a layer", found="none", fix="look")


def stumble(folder: Path) -> Finding:
    raise ValueError("a library's own")


CHECKS = (
    Check("good", "good", lambda _: passed("all is well", number=1)),
    Check("crash", "crash", crash),
    Check("refuse", "refuse", refuse),
    Check("stumble", "stumble", stumble),
    Check("lacks", "lacks", lambda _: missing("no such | thing")),
    Check("after", "after", lambda _: passed("never"), ("good", "crash")),
    Check("last", "last", lambda folder: passed(folder.name), ("good",)),
)
SLOW = Check("hang", "hang", hang)

if __name__ == "__main__":
    name, folder = sys.argv[1:]
    run_one(next(check for check in (*CHECKS, SLOW) if check.name == name), Path(folder))
