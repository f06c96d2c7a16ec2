"""GPUs are told apart by name and compute capability, and the targets in conf/ agree."""

from __future__ import annotations

import pytest
import yaml

from diffusion_engines.backends import gpus
from diffusion_engines.backends.gpus import CAPABILITIES, RTX_TARGETS, Gpu, targets_for
from diffusion_engines.errors import HardwareError
from tests.conftest import ROOT

TARGETS = {
    path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "conf/target").glob("*.yaml")
}


def test_targets_and_the_table_agree() -> None:
    tensorrt = {key: t for key, t in TARGETS.items() if t.get("backend") == "tensorrt"}
    assert {t["gpu"]: t["compute_capability"] for t in tensorrt.values()} == CAPABILITIES
    assert {t["gpu"].lower() for t in tensorrt.values()} == set(tensorrt)
    rtx = {key: t for key, t in TARGETS.items() if key.startswith("rtx")}
    for capability, names in RTX_TARGETS.items():
        assert set(names) == {k for k, t in rtx.items() if capability in t["compute_capabilities"]}


@pytest.mark.parametrize(
    ("name", "word", "expected"),
    [
        ("NVIDIA A10", "A10", True),
        ("NVIDIA A10G", "A10", False),
        ("NVIDIA A100-SXM4-80GB", "A10", False),
        ("NVIDIA A100-SXM4-80GB", "A100", True),
        ("NVIDIA A100 80GB PCIe", "A100", True),
        ("NVIDIA L40S", "L4", False),
        ("NVIDIA H100 80GB HBM3", "H100", True),
        ("NVIDIA H200", "H100", False),
    ],
)
def test_a_model_is_a_whole_word_of_the_name(name: str, word: str, expected: bool) -> None:
    assert Gpu(name, "0.0").is_a(word) is expected


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        (Gpu("NVIDIA A10", "8.6"), "target a10 or rtx"),
        (Gpu("NVIDIA GeForce RTX 4090", "8.9"), "target rtx40 or rtx"),
        (Gpu("NVIDIA GeForce RTX 5090", "12.0"), "target rtx50 or rtx"),
        (Gpu("NVIDIA H200", "9.0"), "target h200"),
        (Gpu("NVIDIA B200", "10.0"), "no target in conf/target/ is for a NVIDIA B200"),
    ],
)
def test_a_gpu_has_its_targets(gpu: Gpu, expected: str) -> None:
    assert expected in targets_for(gpu)


def test_a_machine_without_a_driver_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(HardwareError, match="driver's version cannot be found"):
        gpus.driver_branch()
