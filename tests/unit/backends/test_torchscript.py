"""Wrapping with torchtrtc: what it crashes on never reaches it, and its crash is an error.

The torch-tensorrt here is a double: a package whose torchtrtc does as each test says. The real
program needs CUDA's PyTorch to start.
"""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffusion_engines import manifests
from diffusion_engines.backends import gpus, preflight
from diffusion_engines.backends.gpus import Gpu
from diffusion_engines.backends.nvidia.wrapping import distribution, torchscript
from diffusion_engines.backends.tensorrt import running
from diffusion_engines.errors import BuildError, FingerprintError, HardwareError, IntegrityError
from diffusion_engines.families.base import Dim, TensorSpec
from diffusion_engines.files import write_json
from diffusion_engines.runtime.bundle import check_bundle, load_torchscript, wrap_engine
from tests.conftest import ROOT
from tests.doubles.launcher import install
from tests.manifests import engine_manifest, graph_manifest

A10 = Gpu("NVIDIA A10", "8.6")
SERIES = ".".join(metadata.version("torch").split(".")[:2])
# As torch-tensorrt-rtx 2.11's did on an engine of another compute capability.
CRASH = "import os, signal\nprint('loading', flush=True)\nos.kill(os.getpid(), signal.SIGSEGV)\n"
# As torch-tensorrt's does on a plan that cannot be loaded: nothing catches what its library throws.
ABORT = (
    "import os\n"
    "print(\"terminate called after throwing an instance of 'torch_tensorrt::Error'\\n\"\n"
    "      'Expected (cuda_engine.get() != nullptr) to be true but got false\\n'\n"
    "      'Unable to deserialize the TensorRT engine', flush=True)\n"
    "os.abort()\n"
)
# Writes what a test has put there as a TorchScript file.
COPY = (
    "import shutil, sys\n"
    "assert sys.argv[3:] == ['--embed-engine', '--device-type=gpu'], sys.argv\n"
    "shutil.copy({!r}, sys.argv[2])\n"
)


class Doubled(torch.nn.Module):
    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return latents * 2 + timestep.to(latents.dtype)


def install_torch_tensorrt(
    folder: Path, code: str, *, name: str = "torch_tensorrt", tensorrt_version: str = "10.13.3"
) -> Path:
    """A package like torch-tensorrt of this PyTorch's series, whose torchtrtc is ``code``."""
    package = folder / "torch_tensorrt"
    header = package / "include" / "torch_tensorrt" / "core" / "runtime" / "runtime.h"
    for part in (package / "bin", package / "lib", header.parent):
        part.mkdir(parents=True)
    header.write_text('const std::string ABI_VERSION = "9";\n')
    (package / "__init__.py").write_text("raise ImportError('needs a GPU')\n")
    (package / "_version.py").write_text(
        f'__tensorrt_version__ = "{tensorrt_version}"\n__tensorrt_rtx_version__ = "1.5.0"\n'
    )
    install(package / "bin", "torchtrtc", code)
    # Any library that loads: what it registers, a plan needs and this test's file does not.
    library = Path(torch.__file__).parent / "lib" / "libtorch.so"
    shutil.copy(library, package / "lib" / "libtorchtrt_runtime.so")
    info = folder / f"{name}-{SERIES}.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {SERIES}.0\n")
    return package


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with an A10 and TensorRT 10.13.3, whose runtime must not be asked to load."""
    state = SimpleNamespace(gpu=A10, version="10.13.3.9")

    def library() -> Any:
        # Neither Runtime nor deserialize_cuda_engine exists: using them fails the test.
        return SimpleNamespace(__name__="tensorrt", __version__=state.version)

    monkeypatch.setattr(gpus, "find_gpu", lambda: state.gpu)
    monkeypatch.setattr(running, "library", library)
    return state


def make_engine(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "engine.plan").write_bytes(b"a plan that nothing here may read" * 8)
    (folder / "timing.cache").write_bytes(b"timings")
    inputs = (
        TensorSpec("input_0", "latents", "component", (Dim("batch", 2, 2, 8), 4, 8, 8)),
        TensorSpec("input_1", "timestep", "float32", (1,)),
    )
    manifest = engine_manifest(
        "a10-unet",
        graph_manifest("unet", "fp16", inputs),
        backend="tensorrt",
        builder="trtexec 10.13.3",
        engine="engine.plan",
        settings={
            "wrap": ["torchscript"],
            "build": {
                "version_compatible": False,
                "hardware_compatibility": "none",
                "weights": "embedded",
            },
        },
        fingerprint={
            "tensorrt": "10.13.3",
            "gpu": A10.name,
            "compute_capability": A10.capability,
            "platform": preflight.platform_name(),
        },
    )
    manifests.write(folder, replace(manifest, **changes))
    return folder


@pytest.fixture
def wrapped(machine: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with an engine.ts that PyTorch loads and runs for real."""
    monkeypatch.setattr(torchscript, "_DEVICE", "cpu")
    torch.jit.script(Doubled()).save(str(tmp_path / "real.ts"))
    install_torch_tensorrt(tmp_path / "site", COPY.format(str(tmp_path / "real.ts")))
    monkeypatch.syspath_prepend(tmp_path / "site")
    bundle = tmp_path / "bundles" / "a10" / "unet"
    bundle.mkdir(parents=True)
    wrap_engine(make_engine(tmp_path / "engine"), bundle)
    return bundle


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_wrapped_engine_is_run_once_and_described(wrapped: Path) -> None:
    files = sorted(path.name for path in wrapped.iterdir())
    assert files == ["engine.plan", "engine.ts", "manifest.json"]
    manifest = json.loads((wrapped / "manifest.json").read_text())
    assert manifest["torchscript"] == {
        "file": "engine.ts",
        "package": "torch-tensorrt",
        "tensorrt": "10.13",
        "torch": SERIES,
        "torch_tensorrt": SERIES,
        "abi": "9",
    }
    assert set(manifest["files"]) == {"engine.plan", "engine.ts"}
    module = load_torchscript(wrapped)
    latents = torch.ones(2, 4, 8, 8, dtype=torch.float16)
    assert module(latents, torch.tensor([1.0])).eq(3).all()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("torch", "2.1", ["another PyTorch", "expected: torch 2.1", f"found:    torch {SERIES}"]),
        ("torch_tensorrt", "2.1", ["another torch-tensorrt", "torch_tensorrt 2.1"]),
        ("tensorrt", "8.6", ["for another TensorRT", "tensorrt 8.6"]),
        ("package", "torch-tensorrt-rtx", ["another distribution"]),
        ("abi", "8", ["another form of serialized engines", "expected: abi 8", "found:    abi 9"]),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_file_of_another_abi_is_refused_before_it_is_loaded(
    wrapped: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str, expected: list[str]
) -> None:
    manifest = json.loads((wrapped / "manifest.json").read_text())
    manifest["torchscript"][key] = value
    write_json(wrapped / "manifest.json", manifest)
    monkeypatch.setattr(torch.jit, "load", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(FingerprintError) as raised:
        load_torchscript(wrapped)
    remedies = ("dvc repro wrap@a10-unet", "pip install torch==", " dllist`", "load_bundle")
    for text in (*expected, *remedies):
        assert text in str(raised.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_damaged_file_is_refused_before_it_is_loaded(wrapped: Path) -> None:
    data = bytearray((wrapped / "engine.ts").read_bytes())
    data[100] ^= 1
    (wrapped / "engine.ts").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"engine\.ts is damaged"):
        load_torchscript(wrapped)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (CRASH, ["torchtrtc, wrapping a10-unet failed", "SIGSEGV (it crashed)", "loading"]),
        (ABORT, ["SIGABRT (it crashed)", "Unable to deserialize the TensorRT engine"]),
        ("", ["torchtrtc wrote no complete engine.ts", "found:    none"]),
        (
            "import sys\nopen(sys.argv[2], 'wb').write(b'x' * 1000)\n",
            ["torch.jit.load, running engine.ts of a10-unet failed", "exit status 1"],
        ),
    ],
)
def test_what_goes_wrong_in_torchtrtc_is_an_error_with_its_log(
    machine: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    expected: list[str],
) -> None:
    install_torch_tensorrt(tmp_path / "site", code or "pass\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    (tmp_path / "bundle").mkdir()
    with pytest.raises(BuildError) as raised:
        wrap_engine(make_engine(tmp_path / "engine"), tmp_path / "bundle")
    for text in expected:
        assert text in str(raised.value)


@pytest.mark.parametrize(
    ("gpu", "version", "expected"),
    [
        (Gpu("NVIDIA H100 80GB HBM3", "9.0"), "10.13.3.9", ["another GPU", "target h100"]),
        (Gpu("NVIDIA A10G", "8.6"), "10.13.3.9", ["another GPU", "NVIDIA A10G"]),
        (A10, "10.14.1.48", ["another TensorRT", "expected: 10.13.3", "found:    10.14.1"]),
        (None, "10.13.3.9", ["needs an NVIDIA GPU", "NVIDIA A10, compute capability 8.6"]),
    ],
    ids=["another GPU", "another model of the same capability", "another TensorRT", "no GPU"],
)
def test_a_foreign_engine_never_reaches_torchtrtc(
    machine: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpu: Gpu | None,
    version: str,
    expected: list[str],
) -> None:
    started = tmp_path / "started"
    install_torch_tensorrt(tmp_path / "site", f"open({str(started)!r}, 'w')\n{CRASH}")
    monkeypatch.syspath_prepend(tmp_path / "site")
    machine.gpu, machine.version = gpu, version
    (tmp_path / "bundle").mkdir()
    with pytest.raises((FingerprintError, HardwareError)) as raised:
        wrap_engine(make_engine(tmp_path / "engine"), tmp_path / "bundle")
    for text in expected:
        assert text in str(raised.value)
    assert not started.exists()


def test_a_torch_tensorrt_for_another_tensorrt_is_refused(
    machine: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_torch_tensorrt(tmp_path / "site", CRASH, tensorrt_version="11.0.0")
    monkeypatch.syspath_prepend(tmp_path / "site")
    (tmp_path / "bundle").mkdir()
    with pytest.raises(FingerprintError, match=r"is for another TensorRT than the plan") as raised:
        wrap_engine(make_engine(tmp_path / "engine"), tmp_path / "bundle")
    assert "found:    TensorRT 11.0" in str(raised.value)


@pytest.mark.parametrize(("built", "fits"), [("1.5.0.114", True), ("1.7.1.116", False)])
def test_a_torch_tensorrt_rtx_is_for_one_minor_release(built: str, fits: bool) -> None:
    """Those of PyTorch 2.13 and 2.14 require TensorRT-RTX 1.5 and 1.6."""
    engine = engine_manifest("rtx-unet", fingerprint={"tensorrt_rtx": built})
    abi = {"package": "torch-tensorrt-rtx", "torch_tensorrt": "2.13", "tensorrt": "1.5"}
    if fits:
        distribution.check_series(engine, "tensorrt_rtx", abi)
        return
    with pytest.raises(FingerprintError, match="is for another TensorRT-RTX than the") as raised:
        distribution.check_series(engine, "tensorrt_rtx", abi)
    assert "expected: TensorRT-RTX 1.7, which built the plan" in str(raised.value)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extra,) = re.findall(r"pip install -e '\.\[([\w-]+)\]'", str(raised.value))
    assert "tensorrt-rtx>=1.5,<1.6" in project["optional-dependencies"][extra]


def test_a_missing_or_other_package_is_named(
    machine: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HardwareError, match="found:    no torch-tensorrt") as raised:
        distribution.wrap_fingerprint("tensorrt", ["torchscript"])
    assert "wrap=[]" in str(raised.value)
    # `import torch_tensorrt` needs dllist, which --no-deps leaves out (seen with 2.13.0).
    assert f"`pip install --no-deps torch-tensorrt=={SERIES}.* dllist`" in str(raised.value)
    install_torch_tensorrt(tmp_path / "site", "", name="torch_tensorrt_rtx")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(HardwareError, match="found:    torch-tensorrt-rtx"):
        distribution.wrap_fingerprint("tensorrt", ["torchscript"])
    assert distribution.wrap_fingerprint("tensorrt_rtx", ["torchscript"])["tensorrt"] == "1.5"
    assert distribution.wrap_fingerprint("tensorrt", []) == {}


def test_an_engine_without_the_file_is_loaded_as_a_plan(
    machine: SimpleNamespace, tmp_path: Path
) -> None:
    build = {"version_compatible": False, "hardware_compatibility": "none", "weights": "embedded"}
    settings = {"wrap": [], "build": build}
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    wrap_engine(make_engine(tmp_path / "engine", settings=settings), bundle)
    assert sorted(path.name for path in bundle.iterdir()) == ["engine.plan", "manifest.json"]
    assert check_bundle(bundle).torchscript == {}
    with pytest.raises(FingerprintError, match="was not wrapped as torchscript") as raised:
        load_torchscript(bundle)
    assert "add torchscript to targets.a10.wrap" in str(raised.value)
