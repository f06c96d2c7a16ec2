"""Nothing that this project loads reports to anybody unasked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiers import long

# As a stage and as a server: the package first, then a session.
OURS = "import diffusion_engines"
RUN = "import sys; {first}; import onnxruntime; onnxruntime.InferenceSession(sys.argv[1])"


@pytest.mark.parametrize(
    ("first", "reports"),
    [(OURS, False), ("pass", True)],
    ids=["with this project", "alone"],
)
def test_onnxruntime_keeps_no_database_in_the_users_folder(
    tiny_bundles: Path, tmp_path: Path, first: str, reports: bool
) -> None:
    # Nothing else of this environment: in one that says that it is CI, ONNX Runtime keeps still.
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    subprocess.run(
        [sys.executable, "-c", RUN.format(first=first), tiny_bundles / "text_encoder/engine.onnx"],
        env=environment | {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / ".cache")},
        check=True,
    )
    # The second case shows that there is something to see.
    assert any("onnxruntime" in path.name for path in tmp_path.rglob("*")) == reports


# Waits for the first name that anybody asks for, and as long as ONNX Runtime takes to ask.
WAITING = """
import pathlib, time
asked = [pathlib.Path(path) for path in sys.argv[2:]]
end = time.monotonic() + 60
while not any(path.exists() for path in asked) and time.monotonic() < end:
    time.sleep(0.1)
time.sleep(3)  # the other one may be a little later
"""


@long
def test_no_name_is_looked_up(tiny_bundles: Path, tmp_path: Path) -> None:
    library = tmp_path / "lookups.so"
    source = Path(__file__).parents[1] / "doubles/lookups.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    logs = {first: tmp_path / f"{first.split()[0]}.log" for first in (OURS, "pass")}
    # Both at once: that of ONNX Runtime alone says how long the other one has to keep still.
    running = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", RUN.format(first=first) + WAITING),
                *(tiny_bundles / "text_encoder/engine.onnx", *logs.values()),
            ],
            env={
                **{name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ},
                "HOME": str(tmp_path / log.stem),
                "LD_PRELOAD": str(library),
                "LOOKUPS": str(log),
            },
        )
        for first, log in logs.items()
    ]
    assert [process.wait(120) for process in running] == [0, 0]
    assert "events" in logs["pass"].read_text()  # there is something to see
    assert not logs[OURS].exists()


def test_a_user_may_ask_for_it() -> None:
    code = "import os, diffusion_engines; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"ORT_DISABLE_TELEMETRY": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "0"
