"""PyTorch's compiler: libraries without weights, what links them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_engines import manifests
from diffusion_engines.backends import backend
from diffusion_engines.backends.base import Graph
from diffusion_engines.backends.inductor import building
from diffusion_engines.backends.inductor.building import compiler, packaging
from diffusion_engines.backends.inductor.building.compiler import Compiler, find_compiler
from diffusion_engines.backends.inductor.settings import (
    LAYOUT,
    WEIGHTS,
    InductorBuild,
    InductorTarget,
)
from diffusion_engines.config import Dynamic
from diffusion_engines.errors import (
    BuildError,
    ConfigError,
    FingerprintError,
    HardwareError,
    IntegrityError,
)
from diffusion_engines.families.stable_diffusion import FAMILY
from diffusion_engines.files import MANIFEST, write_json
from diffusion_engines.programs.writing import write_program
from diffusion_engines.runtime.bundle import load_bundle, wrap_engine
from diffusion_engines.runtime.networks import example_inputs
from tests.conftest import STATIC, Loaded, load
from tests.manifests import built_manifest
from tests.shared import made_once
from tests.tiers import long

CPU = InductorTarget(
    "inductor", "cpu", None, InductorBuild(channels_last=True, tune=False, cuda_graph=True)
)
INDUCTOR = backend("inductor")
# In one worker: what is compiled is compiled once.
Engines = Callable[..., tuple[Loaded, Path]]


def build(weights: Path, name: str, folder: Path, precision: str, dynamic: Dynamic) -> None:
    """Write a program and an engine of it, with their manifests, as the stages do."""
    loaded = load(weights, name, precision, dynamic)
    program, engine = folder / "program", folder / "engine"
    for made in (program, engine):
        made.mkdir()
    component = FAMILY.component(name)
    network = weights / component.folder
    write_program(component, network, loaded.inputs, program, precision=precision)
    manifest = manifests.program_without_weights(
        name=f"{name}-{precision}",
        component=name,
        precision=precision,
        inputs=loaded.inputs,
        outputs=component.outputs,
        guidance=True,
        versions={},
    )
    graph = Graph(
        manifest.name, name, precision, "exported_program", program / "program.json", loaded.inputs
    )
    result = INDUCTOR.build(graph, engine, CPU)
    manifests.write(engine, built_manifest(f"cpu-{name}", manifest, CPU, result))


@pytest.fixture(scope="session")
def engines(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    def built(name: str, precision: str = "fp32", dynamic: Dynamic = STATIC) -> tuple[Loaded, Path]:
        folder = made_once(
            tmp_path_factory,
            f"inductor/{name}-{precision}-{dynamic.batch_size is not None}",
            lambda made: build(tiny_weights, name, made, precision, dynamic),
        )
        return load(tiny_weights, name, precision, dynamic), folder / "engine"

    return built


@pytest.mark.parametrize(
    ("name", "precision", "allowed"),
    [
        ("vae_decoder", "fp32", 1e-5),  # has biases of four and three elements
        pytest.param("text_encoder", "fp32", 1e-5, marks=long),  # has constants
        pytest.param("unet", "fp32", 1e-5, marks=long),
        pytest.param("vae_decoder", "bf16", 3e-2, marks=long),
    ],
)
def test_an_engine_computes_what_its_network_does(
    engines: Engines,
    tiny_weights: Path,
    tmp_path: Path,
    name: str,
    precision: str,
    allowed: float,
) -> None:
    loaded, engine = engines(name, precision)
    wrap_engine(engine, tmp_path / "bundle", tiny_weights)

    module = load_bundle(tmp_path / "bundle")

    inputs = example_inputs(loaded.inputs, precision, vocabulary=loaded.vocabulary)
    with torch.no_grad():
        expected = loaded.module(*inputs).float()
    found = module(*inputs).float()
    assert torch.linalg.norm(found - expected) <= allowed * torch.linalg.norm(expected)
    manifest = module.manifest
    assert manifest.dtypes == {precision: len(loaded.module.state_dict())}
    assert manifest.layers["kernel"] > 0
    origin = manifests.read(tiny_weights / FAMILY.component(name).folder, manifests.Weights)
    assert manifest.onnx.weights == origin.digest
    assert (manifest.model, manifest.synthetic) == (origin.model, origin.synthetic)


def test_an_engine_has_no_weights_and_knows_of_none(engines: Engines) -> None:
    loaded, engine = engines("vae_decoder")
    made = manifests.read(engine, manifests.Engine)
    assert (made.model, made.onnx.weights, made.loras) == (None, None, ())
    layout = json.loads((engine / LAYOUT).read_text())
    parts = [part for name, value in layout.items() for part in value.get("parts", [name])]
    assert sorted(parts) == sorted(loaded.module.state_dict())
    of_weights = sum(value.nbytes for value in loaded.module.state_dict().values())
    assert not any(path.suffix == ".safetensors" for path in engine.iterdir())
    # Channels last: a 3×3 convolution's strides.
    convolution = layout["network.decoder.conv_out.weight"]
    assert convolution["stride"][1] == 1
    assert of_weights > 0


def test_threads_that_share_an_engine_get_what_each_would_alone(
    engines: Engines, tiny_weights: Path, tmp_path: Path
) -> None:
    _, engine = engines("vae_decoder")
    wrap_engine(engine, tmp_path / "bundle", tiny_weights)
    module = load_bundle(tmp_path / "bundle")
    latents = [torch.randn(1, 4, 16, 16) for _ in range(8)]
    expected = [module(value) for value in latents]
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(module, latents)]
    assert all(map(torch.equal, found, expected))
    # Else its loops have as many threads as the machine that compiled them.
    assert b"omp_get_max_threads" in (tmp_path / "bundle/engine.so").read_bytes()


@long
def test_open_dimensions_take_every_size(
    engines: Engines, tiny_weights: Path, tmp_path: Path
) -> None:
    dynamic = Dynamic(batch_size=[1, 4], height=None, width=None)
    loaded, engine = engines("text_encoder", "fp32", dynamic)
    wrap_engine(engine, tmp_path / "bundle", tiny_weights)
    module = load_bundle(tmp_path / "bundle")
    for rows in (1, 2, 4):
        tokens = torch.randint(loaded.vocabulary, (rows, 77))
        torch.testing.assert_close(module(tokens), loaded.module(tokens), rtol=1e-4, atol=1e-5)


@long
def test_a_weight_that_became_a_constant_is_an_error(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor writes biases of up to eight elements into its code, unless it is told not to."""
    compile_program = packaging.compile_program

    def inlining(program: Any, path: Path, device: str, options: dict[str, Any]) -> Any:
        return compile_program(
            program, path, device, options | {"always_keep_tensor_constants": False}
        )

    monkeypatch.setattr(building, "compile_program", inlining)
    with pytest.raises(BuildError, match=r"took 2 weight.* for constants"):
        build(tiny_weights, "vae_decoder", tmp_path, "fp32", STATIC)


def test_weights_of_another_network_are_refused(
    engines: Engines, tiny_weights: Path, tmp_path: Path
) -> None:
    _, engine = engines("vae_decoder")
    layout = json.loads((engine / LAYOUT).read_text())
    copy = tmp_path / "engine"
    copy.mkdir()
    for path in engine.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    layout["network.decoder.conv_out.bias"]["shape"] = [4]
    write_json(copy / LAYOUT, layout)
    manifests.write(copy, manifests.read(engine, manifests.Engine))
    with pytest.raises(BuildError, match="do not fit the engine cpu-vae_decoder") as raised:
        wrap_engine(copy, tmp_path / "bundle", tiny_weights)
    assert "conv_out.bias [4]" in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("torch", "2.0.0", "another torch"),
        ("instruction_set", "x86-64", "another instruction set"),
        ("platform", "linux-aarch64", "another platform"),
    ],
)
def test_a_foreign_engine_is_refused_before_it_is_loaded(
    engines: Engines, tiny_weights: Path, tmp_path: Path, key: str, value: str, said: str
) -> None:
    _, engine = engines("vae_decoder")
    bundle = tmp_path / "bundle"
    wrap_engine(engine, bundle, tiny_weights)
    manifest = manifests.read(bundle, manifests.Bundle)
    manifests.write(bundle, replace(manifest, fingerprint={**manifest.fingerprint, key: value}))
    with pytest.raises(FingerprintError, match=said):
        load_bundle(bundle)


def test_a_bundle_without_its_weights_is_refused(
    engines: Engines, tiny_weights: Path, tmp_path: Path
) -> None:
    _, engine = engines("vae_decoder")
    bundle = tmp_path / "bundle"
    wrap_engine(engine, bundle, tiny_weights)
    with pytest.raises(ConfigError, match="no CUDA graphs"):
        load_bundle(bundle, cuda_graph=True)
    (bundle / WEIGHTS).unlink()
    with pytest.raises(IntegrityError, match=r"weights.safetensors is missing"):
        load_bundle(bundle)
    assert (bundle / MANIFEST).is_file()


def test_the_fingerprint_names_a_compiler_that_was_tried() -> None:
    found = INDUCTOR.fingerprint(CPU)
    assert found["torch"] == torch.__version__.split("+")[0]
    assert found["compiler"] == find_compiler("cpu").version


def test_where_no_compiler_works_the_error_says_which_were_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "g++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "broken 1.0" && exit\nexit 3\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setattr(compiler, "_candidates", lambda: [str(broken)])
    monkeypatch.setattr(compiler, "_record", lambda: tmp_path / "compilers.json")
    with pytest.raises(HardwareError) as raised:
        find_compiler("cpu")
    assert f"{broken} (broken 1.0): the trial to build one ended with" in str(raised.value)
    assert "CXX=/usr/bin/g++" in str(raised.value)
    assert not (tmp_path / "compilers.json").exists()


def test_a_compiler_that_worked_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def trial(found: Compiler, device: str) -> None:
        tried.append(found.path)

    monkeypatch.setattr(compiler, "_record", lambda: tmp_path / "home" / "compilers.json")
    monkeypatch.setattr(compiler, "try_compiler", trial)
    first, again = find_compiler("cpu"), find_compiler("cpu")
    assert first == again
    assert tried == [first.path]
    (tmp_path / "home" / "compilers.json").write_text("damaged")
    find_compiler("cpu")
    assert tried == [first.path] * 2
    monkeypatch.setattr(torch, "__version__", "9.9.0")
    find_compiler("cpu")
    assert tried == [first.path] * 3


def test_a_compiler_that_failed_is_passed_over_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad-g++"
    bad.write_text("#!/bin/sh\necho bad 1.0\n")
    bad.chmod(0o755)
    good = compiler._candidates()[0]
    tried = []

    def trial(found: Compiler, device: str) -> str | None:
        tried.append(found.path)
        return None if found.path == good else "ended with -11"

    monkeypatch.setattr(compiler, "_candidates", lambda: [str(bad), good])
    monkeypatch.setattr(compiler, "_record", lambda: tmp_path / "compilers.json")
    monkeypatch.setattr(compiler, "try_compiler", trial)
    assert find_compiler("cpu").path == find_compiler("cpu").path == good
    assert tried == [str(bad), good]
