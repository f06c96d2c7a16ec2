"""Install what `make test-fleet` starts, by Debian's apt: ``python -m tests.fleet.install``.

Ends with an error that says what is missing where that cannot be: a test that is left out without
a word would be no test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from tests.fleet import slurm

# For each server the packages, and the programs by which they are found.
WANTED = {
    "Slurm": (slurm.PACKAGES, slurm.PROGRAMS),
    "OpenSSH": (("openssh-server",), ("sshd",)),
    "a container registry": (("docker-registry",), ("docker-registry",)),
}


def main() -> None:
    """Install what is missing."""
    path = slurm.SYSTEM_PATH
    missing = {
        name: packages
        for name, (packages, programs) in WANTED.items()
        if not all(shutil.which(program, path=path) for program in programs)
    }
    if os.geteuid():
        sys.exit("make test-fleet starts daemons that have to be root's: run it as root")
    if not missing:
        return
    packages = [package for wanted in missing.values() for package in wanted]
    print(f"installing {', '.join(missing)}: {' '.join(packages)}", flush=True)
    if shutil.which("apt-get") is None:
        sys.exit(f"there is no apt-get here: install {' '.join(packages)}, and run it again")
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update", "-qq"],
        # The daemons' own services stay off: the tests start theirs.
        ["apt-get", "install", "-qq", "--yes", "--no-install-recommends", *packages],
    ):
        done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)} ended with {done.returncode}")


if __name__ == "__main__":
    main()
