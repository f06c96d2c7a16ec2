"""Build a plan through the Python API of TensorRT or TensorRT-RTX (``trt`` is either module)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffusion_engines.backends.base import Graph
from diffusion_engines.backends.nvidia.settings import Weights
from diffusion_engines.errors import BuildError
from diffusion_engines.families.base import TensorSpec
from diffusion_engines.precisions import PRECISIONS
from diffusion_engines.progress import progress

ENGINE = "engine.plan"
# The library's names of dtypes.
_PRECISION_OF_DTYPE = {
    "FLOAT": "fp32",
    "HALF": "fp16",
    "BF16": "bf16",
    "INT8": "int8",
    "FP8": "fp8",
}


_BOUNDS = (attrgetter("min"), attrgetter("size"), attrgetter("max"))


def parse_graph(trt: Any, library: str, onnx: Path, logger: Any, flags: int) -> tuple[Any, Any]:
    """Return a builder and the network that its parser made of a graph.

    Args:
        trt: the Python module.
        library: its name with the version, for errors.
        onnx: the graph.
        logger: as of :func:`recording_logger`.
        flags: of ``NetworkDefinitionCreationFlag``.

    Raises:
        BuildError: the parser refused the graph.
    """
    builder = trt.Builder(logger)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise BuildError(
            f"{library} could not parse {onnx}",
            found="\n".join(f"{e.node_name()}: {e.desc()}" for e in errors[:5]),
            fix="try export.exporter=dynamo, or another export.opset",
        )
    _let_attention_decompose(trt, network)
    return builder, network


def _let_attention_decompose(trt: Any, network: Any) -> None:
    """Allow several kernels for an Attention operator (opset 23 on) that no kernel computes alone.

    Without it, text encoders, whose attention has a mask, fail to build.
    """
    attention = getattr(trt.LayerType, "ATTENTION_OUTPUT", None)
    if attention is None:  # before 10.14
        return
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == attention:
            layer.__class__ = trt.IAttentionOutputLayer  # TensorRT's idiom: it has no other cast
            layer.attention.decomposable = True


def write_plan(
    trt: Any,
    library: str,
    builder: Any,
    network: Any,
    config: Any,
    path: Path,
    logger: Any,
    onnx: Path,
) -> None:
    """Build the network and write the plan to ``path``.

    Raises:
        BuildError: the builder failed.
    """
    config.progress_monitor = _progress_monitor(trt)
    ok = _write_stream if hasattr(builder, "build_serialized_network_to_stream") else _write_memory
    if not ok(trt, builder, network, config, path) or path.stat().st_size == 0:
        raise BuildError(
            f"{library} failed to build {onnx}",
            found=last_messages(logger),
            fix="the log above names the layer; more memory is the other usual cause",
        )


def last_messages(logger: Any) -> str:
    """Return the last warnings and errors of a recording logger, or where there are none, notes."""
    notable = [line for line in logger.lines if not line.startswith("[INFO]")]
    return "\n".join((notable or logger.lines)[-12:]) or "no message"


def _write_stream(trt: Any, builder: Any, network: Any, config: Any, path: Path) -> bool:
    with path.open("wb") as file:
        # Streamed: the plan never lies in memory as a whole (1.7 GB for the UNet of SD 1.4).
        return builder.build_serialized_network_to_stream(
            network, config, _stream_writer(trt, file.write)
        )


def _write_memory(trt: Any, builder: Any, network: Any, config: Any, path: Path) -> bool:
    """Releases of TensorRT that cannot stream."""
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return False
    path.write_bytes(plan)
    return True


def set_weights(trt: Any, config: Any, weights: Weights) -> None:
    """Let a builder config keep weights out of the plan, or make it fit others."""
    if weights != "embedded":
        config.set_flag(trt.BuilderFlag.REFIT)
    if weights == "stripped":
        # With REFIT: alone it means REFIT_IDENTICAL, a plan for the weights of its build alone.
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)


def add_profile(builder: Any, config: Any, inputs: Sequence[TensorSpec]) -> None:
    """Give the config an optimization profile for the open dimensions, where there are any."""
    shapes = profile_shapes(inputs)
    if not shapes:
        return
    profile = builder.create_optimization_profile()
    for name, bounds in shapes.items():
        profile.set_shape(name, *bounds)
    config.add_optimization_profile(profile)


def profile_shapes(inputs: Sequence[TensorSpec]) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Return (min, opt, max) shapes of each input that has an open dimension, by name."""
    return {
        value.name: tuple(
            tuple(dim if isinstance(dim, int) else bound(dim) for dim in value.shape)
            for bound in _BOUNDS
        )
        for value in inputs
        if value.dynamic
    }


def layers_of_network(network: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Return how many layers a network has by type, and floating-point tensors by precision."""
    types: Counter[str] = Counter()
    precisions: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        types[layer.type.name] += 1
        for output in range(layer.num_outputs):
            dtype = layer.get_output(output).dtype.name
            if dtype in _PRECISION_OF_DTYPE:
                precisions[_PRECISION_OF_DTYPE[dtype]] += 1
    return dict(types), dict(precisions)


def check_dtypes(graph: Graph, found: Mapping[str, int]) -> None:
    """Compare the dtypes of an engine with its graph's precision.

    Builders run an "fp16" graph that is in fp32 without a word. Where a precision keeps some layers
    higher, any layer in its dtype will do; that they are those asked for, the stage `quantize`
    checks.

    Args:
        graph: that was built.
        found: how many tensors of the engine have each dtype.

    Raises:
        BuildError: too few have that of the precision.
    """
    wanted = PRECISIONS[graph.precision]
    needed = sum(found.values()) / 2 if wanted.every_layer else 0
    if found.get(wanted.dtype, 0) <= needed:
        raise BuildError(
            f"the engine of {graph.path} is not what was asked for",
            expected=f"{'mostly' if wanted.every_layer else 'some'} {wanted.dtype}",
            found=", ".join(f"{count} × {dtype}" for dtype, count in sorted(found.items())),
            fix="look at the export: the precision is a property of the graph",
        )


def recording_logger(trt: Any) -> Any:
    """Return a logger that keeps every message from INFO up in ``lines``."""

    class RecordingLogger(trt.ILogger):
        """Keeps every message for the build log."""

        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.INFO:
                self.lines.append(f"[{severity.name}] {message}")

    return RecordingLogger()


def _stream_writer(trt: Any, write: Callable[[bytes], int]) -> Any:
    class FileWriter(trt.IStreamWriter):
        """Writes the plan to a file as it is produced."""

        def write(self, data: bytes) -> int:
            return write(data)

    return FileWriter()


def _progress_monitor(trt: Any) -> Any:
    class ProgressMonitor(trt.IProgressMonitor):
        """Shows the builder's phases as progress bars."""

        def __init__(self) -> None:
            super().__init__()
            self.bars: dict[str, tqdm[Any]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.bars[phase_name] = progress((), phase_name, total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.bars:
                self.bars[phase_name].update()
            return True

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.bars:
                self.bars.pop(phase_name).close()

    return ProgressMonitor()
