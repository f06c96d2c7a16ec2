"""How a plan is run: contexts, streams, CUDA graphs, and kernels that are kept.

On a double of the runtime (tests/doubles/tensorrt.py): neither TensorRT nor a GPU is here. What
runs on a GPU is in tests/gpu/.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import platformdirs
import pytest
import torch

from diffusion_engines.backends.gpus import Gpu
from diffusion_engines.backends.nvidia.running import Contexts, load_plan
from diffusion_engines.backends.tensorrt_rtx import kernels
from diffusion_engines.errors import HardwareError
from diffusion_engines.manifests import File
from tests.doubles.tensorrt import WIDTH, Engine, Stream, Streams, install_streams, module_of
from tests.manifests import bundle_manifest

A10 = Gpu("NVIDIA A10", "8.6")


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def streams(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Streams:
    return install_streams(engine, monkeypatch)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "engine.plan"
    path.write_bytes(b"a plan")
    return path


def latents(rows: int, value: float) -> torch.Tensor:
    return torch.full((rows, WIDTH), value)


@pytest.mark.parametrize("capture", [False, True], ids=["ours", "the library's"])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_two_sizes_in_turn_keep_apart(
    engine: Engine, streams: Streams, plan: Path, cuda_graph: bool, capture: bool
) -> None:
    settled: list[int] = []

    def contexts(engine: Any) -> Contexts:
        return Contexts(engine.create_execution_context, capture, lambda: settled.append(1))

    module = load_plan(
        module_of(engine), plan, "a10-unet", "cpu", cuda_graph=cuda_graph, contexts=contexts
    )
    for call, rows in enumerate((1, 3, 1, 3, 1)):
        assert module(latents(rows, call)).eq(2 * call).all()
    # A context for each graph, and for calls without one alone.
    assert len(engine.contexts) == (2 if cuda_graph else 1)
    assert streams.captures == (2 if cuda_graph and not capture else 0)
    assert len(settled) == 2
    if cuda_graph and capture:
        # Its graphs hold addresses: they are the same in every call of a size.
        assert len({tuple(call.addresses.values()) for call in engine.calls}) == 2


def test_the_default_stream_is_left_and_waited_for(
    engine: Engine, streams: Streams, plan: Path
) -> None:
    module = load_plan(module_of(engine), plan, "a10-unet", "cpu")
    module(latents(1, 1))
    (own,) = streams.own
    assert engine.calls[-1].stream == own.cuda_stream
    assert (own.waits, streams.default.waits) == ([streams.default], [own])
    streams.current = Stream(7)
    module(latents(1, 1))
    assert engine.calls[-1].stream == 7
    assert (own.waits, streams.default.waits) == ([streams.default], [own])


def test_too_little_memory_is_an_error_that_says_so(
    engine: Engine, streams: Streams, plan: Path
) -> None:
    engine.memory = 1
    module = load_plan(module_of(engine), plan, "a10-unet", "cpu", cuda_graph=True)
    module(latents(1, 1))
    with pytest.raises(HardwareError, match=r"a10-unet could not be prepared .*") as raised:
        module(latents(2, 1))
    assert "found:    1.0 GiB free" in str(raised.value)
    with pytest.raises(HardwareError):
        load_plan(module_of(engine), plan, "a10-unet", "cpu")


def test_a_size_that_the_engine_has_not_names_those_that_it_has(
    engine: Engine, streams: Streams, plan: Path
) -> None:
    module = load_plan(module_of(engine), plan, "a10-unet", "cpu")
    with pytest.raises(ValueError, match=r"does not take \(9, 4\).* \(1, 4\) to \(8, 4\)"):
        module(latents(9, 1))


class Kernels:
    """TensorRT-RTX's cache of compiled kernels: one entry for each call of ``compile``."""

    def __init__(self) -> None:
        self.entries: list[bytes] = []

    def deserialize(self, content: bytes) -> bool:
        if not content.startswith(b"kernels:"):
            return False
        self.entries = content.removeprefix(b"kernels:").split(b",")
        return True

    def serialize(self) -> bytes:
        return b"kernels:" + b",".join(self.entries)


def contexts_of(engine: Engine, path: Path | None, **options: Any) -> tuple[Contexts, Any, Kernels]:
    cache = Kernels()
    config: Any = SimpleNamespace(
        create_runtime_cache=lambda: cache,
        set_runtime_cache=lambda given: setattr(config, "cache", given),
        cuda_graph_strategy="disabled",
    )
    trt = SimpleNamespace(
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole"),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
    )
    found: Any = engine
    found.create_runtime_config = lambda: config
    return kernels.contexts_with_kernels(trt, path, **options)(found), config, cache


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_tensorrt_rtx_records_its_own_graphs(engine: Engine, cuda_graph: bool) -> None:
    contexts, config, cache = contexts_of(engine, None, cuda_graph=cuda_graph)
    assert contexts.capture == cuda_graph
    assert config.cuda_graph_strategy == ("whole" if cuda_graph else "disabled")
    assert config.dynamic_shapes_kernel_specialization_strategy == "eager"
    assert config.cache is cache
    assert contexts.create() is engine.contexts[0]
    contexts.settled()  # nothing to keep, nowhere


def test_compiled_kernels_are_there_the_next_time(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "1.7" / "a10" / "digest"
    contexts, _, cache = contexts_of(engine, path, cuda_graph=False)
    cache.entries = [b"one"]
    contexts.settled()
    assert path.read_bytes() == b"kernels:one"
    contexts, _, cache = contexts_of(engine, path, cuda_graph=False)
    assert cache.entries == [b"one"]
    before = path.stat().st_mtime_ns
    contexts.settled()
    assert path.stat().st_mtime_ns == before  # nothing new
    cache.entries.append(b"two")
    contexts.settled()
    assert path.read_bytes() == b"kernels:one,two"
    assert [file.name for file in path.parent.iterdir()] == ["digest"]
    path.write_bytes(b"of another version")
    contexts, _, cache = contexts_of(engine, path, cuda_graph=False)
    cache.entries = [b"anew"]
    contexts.settled()
    assert path.read_bytes() == b"kernels:anew"


def test_a_folder_that_takes_no_kernels_stops_no_engine(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    contexts, _, cache = contexts_of(engine, tmp_path / "file" / "digest", cuda_graph=False)
    cache.entries = [b"one"]
    with pytest.warns(UserWarning, match="compiled kernels are not kept"):
        contexts.settled()


def test_kernels_are_kept_per_machine_and_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(kernels, "find_gpu", lambda: A10)
    monkeypatch.setattr(kernels, "driver_branch", lambda: "575")
    trt = SimpleNamespace(__version__="1.7.1.116")
    bundle = bundle_manifest("rtx-unet", engine="engine.plan", files={"engine.plan": File(1, "ab")})
    found = kernels.kernels_of(trt, bundle)
    folder = tmp_path / "diffusion-engines" / "tensorrt-rtx" / "1.7.1.116"
    assert found == folder / "NVIDIA-A10-8-6-575" / "ab"

    def no_driver() -> str:
        raise HardwareError("the driver's version cannot be found")

    monkeypatch.setattr(kernels, "driver_branch", no_driver)
    assert kernels.kernels_of(trt, bundle) is None
