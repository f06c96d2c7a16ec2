"""A plan as an exported program: its graph, its sizes, and what torch_tensorrt is asked for.

torch_tensorrt is a double here, as it takes a GPU; docs/verified.md says what was tried with the
real one.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from diffusion_engines.backends.nvidia import wrapping
from diffusion_engines.backends.nvidia.settings import Wrap
from diffusion_engines.backends.nvidia.wrapping import distribution, exported_program, writing
from diffusion_engines.backends.nvidia.wrapping.writing import Multiple, follow_sizes
from diffusion_engines.errors import BuildError, FingerprintError
from diffusion_engines.families.base import Dim, TensorSpec
from tests.doubles.tensorrt import WIDTH, Engine, module_of
from tests.manifests import bundle_manifest, engine_manifest, graph_manifest

BATCH, HEIGHT = Dim("batch", 2, 1, 8), Dim("height", 16, 8, 32, 8)
LATENTS = TensorSpec("input_0", "latents", "component", (BATCH, 4, HEIGHT, 16))
TIMESTEP = TensorSpec("input_1", "timestep", "float32", (1,))
TEXT = TensorSpec("input_2", "text embeddings", "component", (BATCH, 77, 32))
FIXED = TensorSpec("input_0", "latents", "component", (2, 4, 16, 16))


def decoded(shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    batch, _, height, width = shapes[0]
    return [(batch, 3, 8 * height, 8 * width), (77, 5)]


def test_sizes_of_outputs_follow_from_those_of_inputs() -> None:
    batch, height = Multiple(0, 0, 1), Multiple(0, 2, 8)
    assert follow_sizes([LATENTS, TIMESTEP, TEXT], decoded) == [[batch, 3, height, 128], [77, 5]]
    assert follow_sizes([FIXED], decoded) == [[2, 3, 128, 128], [77, 5]]
    # Inputs share dimensions by name: another batch alone would be a shape that no engine takes.
    asked = []

    def ask(shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        asked.append(shapes)
        return [(1,)]

    follow_sizes([LATENTS, TEXT], ask)
    assert len(asked) == 3
    assert all(latents[0] == text[0] for latents, text in asked)


def test_a_size_that_follows_otherwise_is_refused() -> None:
    with pytest.raises(BuildError, match="does not follow from height") as raised:
        follow_sizes([LATENTS], lambda shapes: [(shapes[0][2] + 1,)])
    assert "found:    17 at 16, 9 at 8" in str(raised.value)


class Doubled(nn.Module):
    """Stands for torch_tensorrt's module of an engine, which returns a list."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor) -> list[torch.Tensor]:
        return [latents * 2 + index for index in range(self.outputs)]


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("latents", [LATENTS, FIXED], ids=["open", "fixed"])
def test_the_graph_calls_the_engine_and_knows_its_sizes(latents: TensorSpec, outputs: int) -> None:
    half = torch.float16
    specs = [latents, TIMESTEP]
    sizes = follow_sizes(specs, lambda shapes: outputs * [shapes[0]])
    graph = writing.graph_of_engine(
        Doubled(outputs),
        {"input_0": half, "input_1": torch.float32},
        specs,
        [(of, half) for of in sizes],
        "cpu",
    )
    # As torch_tensorrt's exporter finds an engine and the number of its outputs.
    (call,) = [node for node in graph.graph.nodes if node.op == "call_module"]
    assert "_run_on_acc" in call.name
    assert len(call.meta["val"]) == outputs
    first = graph.graph.find_nodes(op="placeholder")[0].meta["val"]
    assert call.meta["val"][0].shape == first.shape
    assert call.meta["val"][0].dtype == half
    is_open = [isinstance(size, torch.SymInt) for size in first.shape]
    assert is_open == [latents is LATENTS, False, latents is LATENTS, False]


@pytest.fixture
def torch_tensorrt(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Doubles of torch_tensorrt and of TensorRT with an engine of (n, 4) in fp32."""
    trt = module_of(Engine())
    trt.bfloat16, trt.int64 = "bf16", "int64"
    made = SimpleNamespace(saved=None)

    class TorchTensorRTModule(nn.Module):
        def __init__(self, plan: bytes, inputs: Any, outputs: Any, **options: Any) -> None:
            super().__init__()
            made.plan, made.inputs, made.outputs, made.options = plan, inputs, outputs, options

    made.runtime = SimpleNamespace(TorchTensorRTModule=TorchTensorRTModule)
    made.save = lambda *args, **options: setattr(made, "saved", (args, options))
    made.dynamo = SimpleNamespace(CompilationSettings=lambda **settings: settings)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", made)
    monkeypatch.setitem(sys.modules, "torch_tensorrt.dynamo", made.dynamo)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(writing, "_DEVICE", "cpu")
    return made


def test_torch_tensorrt_is_asked_for_a_program_with_the_ranges(
    torch_tensorrt: SimpleNamespace, tmp_path: Path
) -> None:
    (tmp_path / "engine.plan").write_bytes(b"a plan")
    spec = TensorSpec("input_0", "latents", "float32", (BATCH, WIDTH))
    target = tmp_path / "engine.pt2"
    writing.write("tensorrt", True, tmp_path / "engine.plan", target, [spec])
    assert torch_tensorrt.plan == b"a plan"
    assert (torch_tensorrt.inputs, torch_tensorrt.outputs) == (["input_0"], ["output_0"])
    assert torch_tensorrt.options["settings"] == {"hardware_compatible": True}
    (graph, path), options = torch_tensorrt.saved
    assert path == str(target)
    assert (options["output_format"], options["retrace"]) == ("exported_program", False)
    (dims,) = options["dynamic_shapes"]
    assert (dims[0].min, dims[0].max) == (1, 8)
    (call,) = [node for node in graph.graph.nodes if node.op == "call_module"]
    (image,) = call.meta["val"]
    assert isinstance(image.shape[0], torch.SymInt)


@pytest.mark.parametrize(
    ("backend", "compatibility", "expected"),
    [
        ("tensorrt", "none", False),
        ("tensorrt", "ampere_plus", True),
        ("tensorrt_rtx", None, True),
    ],
)
def test_a_program_fits_the_gpus_that_its_plan_fits(
    backend: str, compatibility: str | None, expected: bool
) -> None:
    build = {"hardware_compatibility": compatibility} if compatibility else {}
    engine = engine_manifest("a10-unet", backend=backend, settings={"build": build})
    assert exported_program.fits_other_gpus(engine) == expected


def test_a_wrap_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    abi = {"torch": "2.13", "package": "torch-tensorrt", "torch_tensorrt": "2.13"}
    abi |= {"tensorrt": "11.0", "abi": "9"}
    monkeypatch.setattr(distribution, "wrap_fingerprint", lambda *_: abi)
    bundle = bundle_manifest("a10-unet", torchscript={**abi, "program": "engine.pt2"})
    kinds: tuple[Wrap, Wrap] = ("exported_program", "torchscript")
    found, lacking = (wrapping.KEYS[kind] for kind in kinds)
    assert distribution.check_abi(bundle, "tensorrt", found, kinds[0]) == "engine.pt2"
    with pytest.raises(FingerprintError, match="was not wrapped as torchscript") as raised:
        distribution.check_abi(bundle, "tensorrt", lacking, kinds[1])
    assert "found:    another wrap" in str(raised.value)


@pytest.mark.skipif(
    importlib.util.find_spec("torch_tensorrt") is not None, reason="torch_tensorrt is here"
)
def test_a_process_that_fails_is_an_error_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exported_program, "library_path", lambda _: "")
    graph = graph_manifest("unet", "fp16", (replace(TIMESTEP, name="input_0"),))
    engine = engine_manifest("a10-unet", graph, backend="tensorrt", engine="engine.plan")
    with pytest.raises(BuildError, match=r"wrapping a10-unet as engine\.pt2 failed") as raised:
        exported_program.write_program(tmp_path, engine, "tensorrt")
    assert "No module named 'torch_tensorrt'" in raised.value.found
    assert "leave exported_program out of targets.*.wrap" in raised.value.fix
    assert "dllist" in raised.value.fix
