"""A backend and a family are one module each, and YAML: the DAG of a clone runs with both."""

from __future__ import annotations

import json

import pytest

from tests.pipeline.conftest import Clone
from tests.toys import add_backend, add_family

# In `make test`: tests/unit/families/test_toy_family.py, and the toy backend in test_machines.py.
pytestmark = [pytest.mark.pipeline, pytest.mark.long]

FLEET = """\
# @package _global_
# The toy family on the toy backend, and on a CPU; for tests.
defaults:
  - /target@targets.cpu: cpu
  - /target@targets.toy: toy
  - /precision@fleet.cpu: fp16
  - /precision@fleet.toy: fp32
fleet:
  cpu: {only: [denoiser]}
  toy: {components: {decoder: fp16}}
measure: [toy]
"""


def test_a_family_and_a_backend_are_a_module_each_and_yaml(fresh: Clone) -> None:
    add_family(fresh)
    add_backend(fresh)
    added = fresh.run("git", "status", "--porcelain", "--untracked-files=all").output.split("\n")
    code = sorted(line[3:] for line in added if line.endswith(".py"))
    assert code == [
        "src/diffusion_engines/backends/toy/__init__.py",
        "src/diffusion_engines/families/toy.py",
    ]
    assert all(line.startswith("??") for line in added if line)  # nothing that was there changed
    assert all(line[3:].startswith(("conf/", "src/")) for line in added if line)
    (fresh.path / "conf/fleet/toys.yaml").write_text(FLEET)
    fresh.compose("model=toy", "fleet=toys")

    outcome = fresh.repro(env={"TOY_GPU": "alpha"})

    assert {
        *("export@transformer-fp32", "export@transformer-fp16", "export@vae_decoder-fp16"),
        *("build@cpu-transformer", "build@toy-transformer", "build@toy-vae_decoder"),
        *("validate@toy", "benchmark@toy", "generate@toy", "report"),
    } <= outcome.ran
    artifacts = fresh.path / "artifacts"
    metrics = json.loads((artifacts / "metrics/validate/toy.json").read_text())
    assert 0 < metrics["transformer_rel_l2"] < 1e-4
    assert json.loads((artifacts / "metrics/benchmark/toy.json").read_text())["denoiser_ms"] > 0
    assert (artifacts / "plots/validate/toy/denoiser.csv").read_text().count("transformer") > 0
    assert (artifacts / "images/toy/image-00.png").is_file()
    page = (artifacts / "report/index.html").read_text()
    assert "toy-transformer" in page
    assert "one transformer call" in page
    assert fresh.repro(env={"TOY_GPU": "alpha"}).built == set()
