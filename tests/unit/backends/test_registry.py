"""Backends are found by name, declare themselves without their libraries, and can be anybody's."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffusion_engines.backends import backend, backend_names, gpus
from diffusion_engines.backends.base import Graph
from diffusion_engines.backends.gpus import Gpu
from diffusion_engines.backends.targets import device_of_engine, target_from_settings
from diffusion_engines.checks import check_params
from diffusion_engines.config import params_from_config
from diffusion_engines.errors import ConfigError, HardwareError, IntegrityError
from diffusion_engines.precisions import PRECISIONS
from tests.conftest import ROOT
from tests.manifests import engine_manifest

TOY = '''\
"""A backend whose engine is the graph's bytes, reversed."""

from typing import Literal

from pydantic.dataclasses import dataclass

from diffusion_engines.backends.base import STRICT, BuildResult


@dataclass(config=STRICT)
class Target:
    backend: Literal["toy"]
    build: dict[str, int]


class Toy:
    name = "toy"
    settings = Target
    precisions = ("fp32",)
    graph_format = "onnx"
    code = "conf/build/toy.yaml"
    shared = "src/diffusion_engines/backends/base.py"
    wrap_code = "conf/build/toy.yaml"

    def check(self, target, precisions):
        return ["build.speed: too fast (conf/build/)"] if target.build["speed"] > 9 else []

    def device(self, target):
        return "cpu"

    def timing(self, target):
        return False

    def builds_without_weights(self, target):
        return False

    def fingerprint(self, target):
        return {"toys": 1}

    def build(self, graph, folder, target, timing_cache=None):
        (folder / "engine.toy").write_bytes(graph.path.read_bytes()[::-1])
        return BuildResult("engine.toy", "toy 1", "", {}, {})


BACKEND = Toy()
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install the toy as pip would: a module and what the distribution says of it."""
    info = tmp_path / "toy_engines-1.2.dist-info"
    info.mkdir()
    (tmp_path / "toy_engines.py").write_text(TOY)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-engines\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(
        "[diffusion_engines.backends]\ntoy = toy_engines:BACKEND\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_engines", raising=False)
    return tmp_path


def test_packages_that_declare_a_backend_are_the_backends() -> None:
    assert backend_names() == ("inductor", "onnxruntime", "tensorrt", "tensorrt_rtx")
    with pytest.raises(ConfigError, match="no such backend: nope") as raised:
        backend("nope")
    assert "expected: inductor, onnxruntime, tensorrt, tensorrt_rtx" in str(raised.value)


@pytest.mark.parametrize("name", backend_names())
def test_a_backend_declares_what_there_is(name: str) -> None:
    declared = backend(name)
    assert declared.name == name
    assert set(declared.precisions) <= set(PRECISIONS)
    for path in (declared.code, declared.shared, declared.wrap_code):
        assert (ROOT / path).exists()
    assert declared.code != declared.shared  # DVC takes no dependency twice


def test_declaring_takes_no_library() -> None:
    """DVC composes conf/, and check_conf checks it, with none of them."""
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxruntime', 'tensorrt', 'tensorrt_rtx', 'diffusers'):\n"
        "    sys.modules[name] = None\n"
        "import yaml\n"
        "import diffusion_engines.stage, diffusion_engines.compose\n"
        "import diffusion_engines.backends.probe, diffusion_engines.runtime.bundle\n"
        "from diffusion_engines.backends import backend, backend_names\n"
        "from diffusion_engines.config import params_from_config\n"
        "from pathlib import Path\n"
        "from diffusion_engines.checks import check_params\n"
        "check_params(params_from_config(yaml.safe_load(open('params.yaml'))), Path())\n"
        "print([backend(name).name for name in backend_names()])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == list(backend_names())


def test_anybody_can_add_a_backend(toy: Path) -> None:
    assert "toy" in backend_names()
    params: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["targets"]["toy"] = {"backend": "toy", "build": {"speed": 1}}
    unet = params["engines"]["cpu-unet"]
    params["engines"]["toy-unet"] = unet | {"target": "toy", "backend": "toy"}
    params["fleet"]["toy"] = params["fleet"]["cpu"]
    typed = params_from_config(params)
    check_params(typed, ROOT)
    target = typed["targets"]["toy"]
    (toy / "model.onnx").write_bytes(b"abc")
    graph = Graph("unet-fp32", "unet", "fp32", "onnx", toy / "model.onnx", [])
    result = backend("toy").build(graph, toy, target)
    assert (toy / result.engine).read_bytes() == b"cba"
    # Nothing else says that another release of the package builds other engines.
    assert backend("toy").fingerprint(target) == {
        "toys": 1,
        "package": "toy-engines",
        "package_version": "1.2",
    }
    params["targets"]["toy"]["build"]["speed"] = 10
    with pytest.raises(ConfigError, match=r"targets\.toy\.build\.speed: too fast"):
        check_params(params_from_config(params), ROOT)
    params["targets"]["toy"]["build"]["speed"] = "fast"
    with pytest.raises(ConfigError, match=r"targets\.toy\.build\.speed: .*'fast' \(conf/build/\)"):
        params_from_config(params)


def test_a_backend_that_cannot_be_imported_is_named(toy: Path) -> None:
    (toy / "toy_engines.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(ConfigError, match=r"backend toy of toy-engines 1\.2 cannot be") as raised:
        backend("toy")
    assert "nothing_of_this_name" in str(raised.value)


CPU = {
    "backend": "onnxruntime",
    "device": "cpu",
    "build": {"optimization_level": "all", "tf32": False},
}
A10 = {
    "backend": "tensorrt",
    "gpu": "A10",
    "compute_capability": "8.6",
    "wrap": [],
    "build": yaml.safe_load((ROOT / "conf/build/tensorrt.yaml").read_text()),
}
RTX = {
    "backend": "tensorrt_rtx",
    "compute_capabilities": ["8.6", "8.9"],
    "wrap": [],
    "build": yaml.safe_load((ROOT / "conf/build/tensorrt_rtx.yaml").read_text()),
}
GPUS = {
    "no GPU": None,
    "A10": Gpu("NVIDIA A10", "8.6"),
    "RTX 3090": Gpu("NVIDIA GeForce RTX 3090", "8.6"),
    "H100": Gpu("NVIDIA H100 80GB HBM3", "9.0"),
}


@pytest.mark.parametrize(
    ("settings", "fitting"),
    [
        (CPU, {"no GPU", "A10", "RTX 3090", "H100"}),
        (CPU | {"device": "cuda"}, {"A10", "RTX 3090", "H100"}),
        (A10, {"A10"}),
        (RTX, {"A10", "RTX 3090"}),
    ],
    ids=["cpu", "cuda", "a10", "rtx"],
)
@pytest.mark.parametrize("here", GPUS)
def test_a_target_knows_its_hardware(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], fitting: set[str], here: str
) -> None:
    monkeypatch.setattr(gpus, "find_gpu", lambda: GPUS[here])
    target = target_from_settings(settings)
    if here in fitting:
        backend(target.backend).check_hardware(target)
        return
    with pytest.raises(HardwareError) as raised:
        backend(target.backend).check_hardware(target)
    for label in ("expected:", "found:", "fix:"):
        assert label in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "device"), [(CPU, "cpu"), (CPU | {"device": "cuda"}, "cuda"), (A10, "cuda")]
)
def test_an_engine_runs_on_the_device_of_its_target(settings: dict[str, Any], device: str) -> None:
    assert device_of_engine(engine_manifest(settings=settings)) == device


def test_an_engine_with_settings_of_another_version_says_how_to_rebuild() -> None:
    settings = CPU | {"threads": 4}
    with pytest.raises(IntegrityError, match="other settings than a target") as raised:
        device_of_engine(engine_manifest("cpu-unet", settings=settings))
    assert "dvc repro build@cpu-unet" in str(raised.value)
