"""Make the virtual environment and install the pinned dependencies: ``make_env.py .venv``.

Does nothing when the environment was made from the same pyproject.toml and constraints.txt. Two at
once wait for each other. Runs on the system's Python with its standard library alone.
"""

import fcntl
import hashlib
import subprocess
import sys
import venv
from pathlib import Path

MINIMUM = (3, 11)
INPUTS = ("pyproject.toml", "constraints.txt")


def main() -> None:
    if sys.version_info < MINIMUM:
        sys.exit(
            f"this project needs Python {'.'.join(map(str, MINIMUM))} or later\n"
            f"  found:    {sys.version.split()[0]}\n"
            "  fix:      make PYTHON=python3.12 …"
        )
    target = Path(sys.argv[1])
    with Path(".env.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another make installs the environment; waiting for it …", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        install(target)


def install(target: Path) -> None:
    stamp = target / "installed"
    digest = hashlib.sha256(b"".join(Path(name).read_bytes() for name in INPUTS)).hexdigest()
    if stamp.is_file() and stamp.read_text() == digest:
        return
    print(f"installing the dependencies into {target}, once: a minute or two …", flush=True)
    venv.create(target, with_pip=True, clear=True)
    command = [
        *(str(target / "bin" / "python"), "-m", "pip", "install", "--quiet"),
        *("--disable-pip-version-check", "-c", "constraints.txt", "-e", ".[dev,quantize]"),
    ]
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(f"\ninstalling failed; once the cause above is mended: make env\n{command}")
    stamp.write_text(digest)


if __name__ == "__main__":
    main()
