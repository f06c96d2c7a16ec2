"""Put a program of this folder on PATH under the name of what it stands in for."""

from __future__ import annotations

import sys
from pathlib import Path


def install(folder: Path, name: str, code: str = "") -> Path:
    """Write an executable ``name`` into ``folder``: the double of that name, or ``code``."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    double = Path(__file__).with_name(f"{name}.py")
    body = code or f"import runpy\nrunpy.run_path({str(double)!r}, run_name='__main__')\n"
    path.write_text(f"#!{sys.executable}\n{body}")
    path.chmod(0o755)
    return path
