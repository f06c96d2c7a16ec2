"""Nothing that this project loads reports to anybody unasked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# As a stage and as a server: the package first, then a session.
RUN = "import sys; {first}; import onnxruntime; onnxruntime.InferenceSession(sys.argv[1])"


@pytest.mark.parametrize(
    ("first", "reports"),
    [("import diffusion_engines", False), ("pass", True)],
    ids=["with this project", "alone"],
)
def test_onnxruntime_keeps_no_database_in_the_users_folder(
    tiny_bundles: Path, tmp_path: Path, first: str, reports: bool
) -> None:
    # Nothing else of this environment: ONNX Runtime also keeps still where a variable says that it is in CI.
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    subprocess.run(
        [sys.executable, "-c", RUN.format(first=first), tiny_bundles / "text_encoder/engine.onnx"],
        env=environment | {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / ".cache")},
        check=True,
    )
    # The second case shows that there is something to see.
    assert any("onnxruntime" in path.name for path in tmp_path.rglob("*")) == reports


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
