"""A backend and a family of one module each, which tests add to a clone and run through the DAG."""

from __future__ import annotations

from pathlib import Path

from tests.pipeline.conftest import Clone

TOYS = Path(__file__).parent
TARGET = """\
# A card that only the test's environment has. In a fleet: `- /target@targets.toy: toy`
defaults:
  - /build@build: toy
backend: toy
gpu: alpha
"""
BUILD = """\
# Builder settings of the toy backend. `dvc exp run -S targets.toy.build.effort=2`
effort: 1
"""


def add_backend(clone: Clone) -> None:
    """Add the toy backend: its package, and the YAML of its target and its settings."""
    package = clone.path / "src/diffusion_engines/backends/toy"
    package.mkdir()
    (package / "__init__.py").write_text((TOYS / "backend.py").read_text())
    (clone.path / "conf/target/toy.yaml").write_text(TARGET)
    (clone.path / "conf/build/toy.yaml").write_text(BUILD)
