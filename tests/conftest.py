"""What several test modules share: the tiny model's weights, and single networks of it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from diffusion_engines import manifests
from diffusion_engines.backends.base import Graph
from diffusion_engines.config import Dynamic, Image
from diffusion_engines.families import family_of
from diffusion_engines.families.stable_diffusion import FAMILY
from diffusion_engines.weights.sources import fill_with_random_weights
from tests.manifests import built_manifest, graph_manifest, weights_manifest
from tests.shared import made_once

# Of the models that most tests take.
COMPONENTS = FAMILY.components
ROOT = Path(__file__).parents[1]
TINY = ROOT / "conf" / "architecture" / "tiny"
IMAGE = Image(height=128, width=128, batch_size=1, vae_scale_factor=8)
STATIC = Dynamic(batch_size=None, height=None, width=None)


def load_stage(name: str) -> Any:
    """Return a stage's script as a module."""
    path = ROOT / "stages" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"stage_{name}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def stage_config(name: str) -> type[Any]:
    """Return the dataclass in which a stage's script declares what it reads."""
    config: type[Any] = load_stage(name).Config
    return config


def pytest_configure() -> None:
    """Give each of pytest-xdist's workers, and what it starts, a core of its own.

    Else each runs threads for all cores, and those of ONNX Runtime spin where they have no work.
    And let an interrupt be one: who is started in the background of a script ignores it, and hands
    that on to all that the tests interrupt.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if (worker := os.environ.get("PYTEST_XDIST_WORKER")) is None:
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded, later
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with random weights and manifests; not to be changed."""

    def make(folder: Path) -> None:
        fill_with_random_weights(TINY, folder, seed=0, dtype="fp32")
        for name in FAMILY.folders:
            manifests.write(folder / name, weights_manifest())

    return made_once(tmp_path_factory, "weights", make)


@pytest.fixture
def weights_copy(tiny_weights: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(tiny_weights, tmp_path / "weights"))


@dataclass(frozen=True)
class Loaded:
    """A component of a model."""

    name: str
    module: Any
    inputs: Any
    outputs: list[str]
    vocabulary: int


def load(
    weights: Path,
    name: str,
    precision: str = "fp32",
    dynamic: Dynamic = STATIC,
    image: Image = IMAGE,
) -> Loaded:
    """Load one component with the specification of its inputs."""
    from diffusion_engines.runtime.networks import load_network, read_config

    spec = family_of(weights).component(name)
    folder = weights / spec.folder
    architecture = read_config(spec, folder)
    return Loaded(
        name,
        load_network(spec, folder, precision),
        spec.inputs(architecture, image, dynamic),
        [value.name for value in spec.outputs],
        architecture.get("vocab_size", 0),
    )


def graph_of(path: Path, inputs: Any, precision: str = "fp32", component: str = "unet") -> Graph:
    """An ONNX graph as the stage `build` hands it to a backend."""
    return Graph(f"{component}-{precision}", component, precision, "onnx", path, inputs)


def write_bundles(
    weights: Path,
    folder: Path,
    dynamic: Dynamic = STATIC,
    precision: str = "fp32",
    image: Image = IMAGE,
    only: Collection[str] | None = None,
) -> None:
    """Write a target's folder as `wrap` and `pack` do: ONNX Runtime engines for the CPU.

    ``only``: engines of these components alone.
    """
    plain = dynamic is STATIC and precision == "fp32"  # the older exporter is faster
    from diffusion_engines.backends import backend
    from diffusion_engines.backends.onnxruntime.settings import (
        OnnxRuntimeBuild,
        OnnxRuntimeTarget,
    )
    from diffusion_engines.files import new_folder
    from diffusion_engines.onnx.export import export_module
    from diffusion_engines.runtime.bundle import wrap_engine
    from diffusion_engines.serve.pack import PIPELINE, copy_pipeline_files

    target = OnnxRuntimeTarget("onnxruntime", "cpu", OnnxRuntimeBuild("all", tf32=False))
    module = backend("onnxruntime")
    for name, component in family_of(weights).components.items():
        if only is not None and name not in only:
            continue
        origin = manifests.read(weights / component.folder, manifests.Weights)
        loaded = load(weights, name, precision, dynamic, image)
        scratch = folder.parent / f"{folder.name}-{name}"
        with new_folder(scratch / "graph") as graph:
            export_module(
                loaded.module,
                loaded.inputs,
                graph,
                precision=precision,
                exporter="torchscript" if plain else "dynamo",
                opset=17 if plain else 18,
                patches=[],
                outputs=loaded.outputs,
                vocabulary=loaded.vocabulary,
            )
        with new_folder(scratch / "engine") as engine:
            built = graph_of(scratch / "graph/model.onnx", loaded.inputs, precision, name)
            result = module.build(built, engine, target)
            made = graph_manifest(
                name, precision, loaded.inputs, weights=origin, guidance=image.guidance
            )
            manifests.write(engine, built_manifest(f"cpu-{name}", made, target, result))
        with new_folder(folder / name) as bundle:
            wrap_engine(scratch / "engine", bundle)
    with new_folder(folder / PIPELINE) as rest:
        copy_pipeline_files(weights, rest)


@pytest.fixture(scope="session")
def tiny_bundles(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines of the tiny model for 128×128 pixels and one image; not to be changed."""
    made = made_once(
        tmp_path_factory, "bundles", lambda folder: write_bundles(tiny_weights, folder / "cpu")
    )
    return made / "cpu"


@dataclass(frozen=True)
class Exports:
    """Graphs of the tiny model as the exporters write them; not to be changed."""

    weights: Path
    factory: pytest.TempPathFactory

    def __call__(
        self,
        name: str,
        precision: str = "fp32",
        exporter: str = "dynamo",
        opset: int = 18,
        patches: tuple[str, ...] = (),
        dynamic: Dynamic = STATIC,
    ) -> tuple[Loaded, Path]:
        """Return a component and its graph, which is exported once."""
        from diffusion_engines.onnx.export import export_module

        loaded = load(self.weights, name, precision, dynamic)

        def make(folder: Path) -> None:
            export_module(
                loaded.module,
                loaded.inputs,
                folder,
                precision=precision,
                exporter=exporter,
                opset=opset,
                patches=[*patches],
                vocabulary=loaded.vocabulary,
            )

        settings = (name, precision, exporter, opset, patches, asdict(dynamic))
        key = "-".join(re.findall(r"\w+", repr(settings)))
        return loaded, made_once(self.factory, f"exports/{key}", make) / "model.onnx"


@pytest.fixture(scope="session")
def exports(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tiny_weights, tmp_path_factory)
