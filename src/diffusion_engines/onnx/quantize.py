"""Lower the precision of a graph with NVIDIA ModelOpt, calibrated on recorded inputs.

INT8 and FP8 are post-training quantization: Q/DQ pairs around what is quantized, weights stored in
8 bits. "fp16-mixed" is AutoCast: fp16 where the recorded values allow it, fp32 elsewhere. Both run
in ONNX Runtime on the CPU. https://nvidia.github.io/Model-Optimizer/guides/_onnx_quantization.html
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime

from diffusion_engines.backends import require
from diffusion_engines.config import EightBit, Mixed
from diffusion_engines.errors import ConfigError, ExportError
from diffusion_engines.families.base import Dtype, TensorSpec
from diffusion_engines.files import copy_files
from diffusion_engines.onnx.graph import MODEL, opset_of, save_with_external_data
from diffusion_engines.onnx.session import feeds_of, lean_options, session_of

INSTALL = "pip install -c constraints.txt -e '.[quantize]'"
# What has weights to quantize, and the inputs that hold activation and weight.
LAYERS = ("Conv", "Gemm", "MatMul")
# What may stand between a DequantizeLinear and the layer that it is for.
_TRANSPARENT = ("Cast", "Reshape", "Transpose", "Unsqueeze", "Squeeze")

Inputs = Sequence[Any]  # the input tensors of one recorded call, in the order of their names


@dataclass(frozen=True)
class Lowered:
    """What became of the layers (Conv, Gemm, MatMul) of a graph.

    Attributes:
        lowered: how many run in the lower precision, by operator.
        kept: how many do not, by operator.
    """

    lowered: dict[str, int]
    kept: dict[str, int]


def lower_precision(
    source: Path,
    folder: Path,
    calls: Sequence[Inputs],
    component: str,
    precision: str,
    settings: EightBit | Mixed,
    log: Path,
) -> Lowered:
    """Write the graph of ``source`` in another precision into ``folder``.

    Args:
        source: the folder of a simplified graph.
        folder: gets the graph.
        calls: inputs to calibrate on.
        component: whose graph it is; what is kept is named by component.
        precision: that it gets.
        settings: of that precision.
        log: the folder that gets ``modelopt.log``.

    Raises:
        HardwareError, ConfigError, ExportError: as of :func:`quantize_graph`.
    """
    kept, path = settings.kept.get(component, []), log / "modelopt.log"
    if isinstance(settings, Mixed):
        return mix_precision(source, folder, calls, largest=settings.largest, kept=kept, log=path)
    return quantize_graph(
        source,
        folder,
        calls,
        precision=precision,
        source_precision=settings.source,
        method=settings.method,
        kept=kept,
        log=path,
    )


def typed_inputs(inputs: Sequence[TensorSpec], precision: str) -> tuple[TensorSpec, ...]:
    """Return the inputs of a graph with "component" replaced by the dtype that it stands for.

    Inputs and outputs of a quantized graph have the precision of its source.
    """
    dtypes: dict[str, Dtype] = {"fp32": "float32", "fp16": "float16"}
    return tuple(
        replace(value, dtype=dtypes[precision]) if value.dtype == "component" else value
        for value in inputs
    )


def opset_on_disk(path: Path) -> int:
    """Return the opset of a graph on disk. Q/DQ in fp16 needs 19: ModelOpt may have raised it."""
    return opset_of(onnx.load(path, load_external_data=False))


def layer_names(model: onnx.ModelProto) -> dict[str, str]:
    """Return the name of each layer (Conv, Gemm, MatMul) by node: its weight's, as in PyTorch.

    Exporters fold the transposition of a linear layer's weight, which is called ``val_221`` then,
    and a product of two activations has no weight. Such a layer is named after the module in which
    it stands, ``network.mid_block.attentions.0.val_221``: that of the last weight before it that
    kept its name.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    names, module = {}, ""
    for node in model.graph.node:
        own = [name for name in node.input if name in weights]
        if named := [name for name in own if name.count(".") > 1]:
            module = named[0].rsplit(".", 2)[0]
        if node.op_type in LAYERS:
            last = [*own, node.name][0]
            names[node.name] = named[0] if named else f"{module}.{last}".lstrip(".")
    return names


def kept_nodes(model: onnx.ModelProto, patterns: Sequence[str]) -> list[str]:
    """Return the names of the nodes whose weights match one of the regular expressions.

    Weights are named as in PyTorch (:func:`layer_names`), nodes as the exporter likes.

    Raises:
        ConfigError: a pattern matches nothing, so it would keep nothing in high precision.
    """
    weights, layers = {tensor.name for tensor in model.graph.initializer}, layer_names(model)
    found: dict[str, None] = {}
    for pattern in patterns:
        names = [
            node.name
            for node in model.graph.node
            if any(
                re.search(pattern, name)
                for name in (*weights.intersection(node.input), layers.get(node.name, ""))
            )
        ]
        if not names:
            raise ConfigError(
                f"quantize.*.kept: no weight of this graph matches {pattern!r} (conf/quantize/)",
                expected="a regular expression on names such as "
                + ", ".join(sorted(name for name in weights if name.endswith(".weight"))[:3]),
                found=pattern,
                fix="correct or remove it",
            )
        found |= dict.fromkeys(names)
    return list(found)


def quantize_graph(
    source: Path,
    folder: Path,
    calls: Sequence[Inputs],
    *,
    precision: str,
    source_precision: str,
    method: str,
    kept: Sequence[str],
    log: Path,
) -> Lowered:
    """Write the INT8 or FP8 graph of ``source`` into ``folder``, weights external.

    Inputs and outputs keep their types. ModelOpt decides which operators profit, for TensorRT.

    Args:
        source: the folder of a simplified graph in fp16 or fp32.
        folder: gets the graph.
        calls: inputs to calibrate on.
        precision: int8 or fp8.
        source_precision: what is not quantized has it.
        method: of calibration: max or entropy.
        kept: regular expressions on the names of weights that stay in high precision.
        log: gets what ModelOpt prints.

    Raises:
        HardwareError: ModelOpt is not installed.
        ConfigError: a pattern in ``kept`` matches nothing.
        ExportError: ModelOpt failed, or quantized something else than was asked for.
    """
    _require_modelopt()
    names = kept_nodes(onnx.load(source / MODEL, load_external_data=False), kept)
    with _workshop(source, folder) as work, _quietly(log, f"quantize {source.name}"):
        # Not by an import statement: the package has a function of the same name.
        quantization = importlib.import_module("modelopt.onnx.quantization.quantize")
        # ModelOpt drops the types of intermediate tensors. ONNX cannot find them again behind a
        # GroupNormalization (opset 21 and later), and what has no type is left unquantized without
        # a word: half of the activations of a UNet. Ours are checked, so they can stay.
        with (
            mock.patch.object(quantization, "clear_stale_value_info", return_value=0),
            _histograms_in_fp32(),
            # Its sessions would hold the weights twice more, in fp32 and packed for speed.
            mock.patch.object(onnxruntime, "SessionOptions", lean_options),
        ):
            quantization.quantize(
                str(work / MODEL),
                quantize_mode=precision,
                calibration_data_reader=_reader(session_of(work / MODEL).get_inputs(), calls),
                calibration_method=method,
                calibration_eps=["cpu"],
                # Regular expressions that are matched at the start: "conv2d" is "conv2d_1", too.
                nodes_to_exclude=[f"{re.escape(name)}$" for name in names],
                use_external_data_format=True,
                output_path=str(work / "quantized.onnx"),
                high_precision_dtype=source_precision,
                dq_only=True,  # weights are stored in 8 bits; activations keep both, Q and DQ
                log_level="INFO",
            )
        model = onnx.load(work / "quantized.onnx")
    save_with_external_data(model, folder / MODEL)
    return check_quantized(model, names, source.name)


def check_quantized(model: onnx.ModelProto, kept: Sequence[str], name: str) -> Lowered:
    """Count the layers that are quantized and those that are not.

    Raises:
        ExportError: nothing is quantized; or a layer has a quantized weight and another activation,
            so that it would run in high precision; or a layer is quantized that should not be.
    """
    producers = {output: node for node in model.graph.node for output in node.output}
    quantized: Counter[str] = Counter()
    others: Counter[str] = Counter()
    halves, broken = [], []
    for node in model.graph.node:
        if node.op_type not in LAYERS:
            continue
        activation, weight = (dequantized(producers, node.input[i]) for i in (0, 1))
        if weight and activation:
            quantized[node.op_type] += 1
            if node.name in kept:
                broken.append(node.name)
        else:
            others[node.op_type] += 1
            if weight:
                halves.append(node.name)
    if broken or halves or not quantized:
        raise ExportError(
            f"ModelOpt quantized other layers of {name} than was asked for",
            expected="layers with activations and weights in 8 bits, but for those kept",
            found="\n".join(
                [
                    *([] if quantized else ["no quantized layer"]),
                    *(f"{node}: a weight in 8 bits, its activation not" for node in halves[:5]),
                    *(f"{node}: quantized, though quantize.*.kept names it" for node in broken[:5]),
                ]
            ),
            fix="try another export.opset (18 and 22 are tested); look at artifacts/logs/quantize/",
        )
    return Lowered(dict(quantized), dict(others))


def quantized_layers(model: onnx.ModelProto) -> set[str]:
    """Return the names of the layers (Conv, Gemm, MatMul) whose two operands are in 8 bits."""
    producers = {output: node for node in model.graph.node for output in node.output}
    return {
        node.name
        for node in model.graph.node
        if node.op_type in LAYERS and all(dequantized(producers, node.input[i]) for i in (0, 1))
    }


def dequantized(producers: dict[str, onnx.NodeProto], name: str) -> bool:
    """Whether a tensor comes out of a DequantizeLinear, as it is or in another shape or dtype."""
    node = producers.get(name)
    while node is not None and node.op_type in _TRANSPARENT:
        node = producers.get(node.input[0])
    return node is not None and node.op_type == "DequantizeLinear"


def mix_precision(
    source: Path,
    folder: Path,
    calls: Sequence[Inputs],
    *,
    largest: float,
    kept: Sequence[str],
    log: Path,
) -> Lowered:
    """Write a graph into ``folder`` that runs in fp16 wherever the recorded values allow it.

    Inputs and outputs stay in fp32. Weights outside of fp16's range stay in fp32, too.

    Args:
        source: the folder of a simplified fp32 graph.
        folder: gets the graph.
        calls: inputs on which every operator is watched.
        largest: operators that see a larger absolute value stay in fp32.
        kept: regular expressions on the names of weights whose operators stay in fp32.
        log: gets what ModelOpt prints.

    Raises:
        HardwareError: ModelOpt is not installed.
        ConfigError: a pattern in ``kept`` matches nothing.
        ExportError: ModelOpt failed.
    """
    _require_modelopt()
    names = kept_nodes(onnx.load(source / MODEL, load_external_data=False), kept)
    with _workshop(source, folder) as work, _quietly(log, f"mix the precision of {source.name}"):
        inputs = session_of(work / MODEL).get_inputs()
        data = work / "calls"
        data.mkdir()
        for index, tensors in enumerate(calls):
            np.savez(data / f"{index:04d}.npz", **feeds_of(inputs, tensors))  # type: ignore[arg-type]
        autocast = importlib.import_module("modelopt.onnx.autocast")
        model = autocast.convert_to_mixed_precision(
            str(work / MODEL),
            low_precision_type="fp16",
            nodes_to_exclude=[f"{re.escape(name)}$" for name in names],
            data_max=largest,
            keep_io_types=True,
            calibration_data=str(data),
            providers=["cpu"],
        )
        save_with_external_data(model, folder / MODEL)
    return _count_by_type(folder / MODEL)


def _count_by_type(path: Path) -> Lowered:
    """Tell the layers with fp16 results from the others."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    lowered: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for node in model.graph.node:
        if node.op_type in LAYERS:
            half = types.get(node.output[0]) == onnx.TensorProto.FLOAT16
            (lowered if half else kept)[node.op_type] += 1
    return Lowered(dict(lowered), dict(kept))


def _require_modelopt() -> None:
    """Raise HardwareError where ModelOpt, or what its ONNX path imports, is not installed."""
    for module in ("modelopt", "onnx_graphsurgeon", "onnxconverter_common", "onnxslim", "lief"):
        require(module, INSTALL)
    for module in ("cppimport", "polygraphy"):
        require(module, INSTALL)


def _reader(inputs: Sequence[Any], calls: Sequence[Inputs]) -> Any:
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class RecordedCalls(CalibrationDataReader):
        """Hands out one recorded call after the other."""

        def __init__(self) -> None:
            self.rewind()

        def get_next(self) -> dict[str, np.ndarray] | None:
            tensors = next(self.remaining, None)
            return None if tensors is None else feeds_of(inputs, tensors)

        def get_first(self) -> dict[str, np.ndarray]:
            """Part of what ModelOpt asks of a reader."""
            return feeds_of(inputs, calls[0])

        def rewind(self) -> None:
            """Part of what ModelOpt asks of a reader."""
            self.remaining = iter(calls)

    return RecordedCalls()


@contextlib.contextmanager
def _histograms_in_fp32() -> Iterator[None]:
    """Keep entropy calibration of fp16 graphs from asking for finer bins than fp16 has numbers."""
    patching = importlib.import_module("modelopt.onnx.quantization.ort_patching")
    original = patching._collect_value

    def collect(collector: Any, arrays: dict[str, Any]) -> Any:
        return original(
            collector,
            {name: [np.asarray(a, np.float32) for a in values] for name, values in arrays.items()},
        )

    with mock.patch.object(patching, "_collect_value", collect):
        yield


@contextlib.contextmanager
def _workshop(source: Path, folder: Path) -> Iterator[Path]:
    """Yield a folder with a copy of the graph, which also takes every temporary file.

    ModelOpt writes beside the graph that it reads, and leaves gigabytes in /tmp when it is killed;
    ``folder`` is removed in that case.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="work-") as name:
        work = Path(name)
        copy_files(source, work)
        with mock.patch.object(tempfile, "tempdir", str(work)):
            yield work
        # ModelOpt's graphs are cycles of few objects and gigabytes of weights: Python, which counts
        # objects, would not look for them while the comparison runs.
        gc.collect()


@contextlib.contextmanager
def _quietly(log: Path, task: str) -> Iterator[None]:
    """Send what Python prints to ``log``; name it when the task fails.

    Raises:
        ExportError: the task failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            yield
        except (OSError, MemoryError):
            raise
        except Exception as error:  # ModelOpt raises whatever its libraries do
            raise ExportError(
                f"ModelOpt could not {task}",
                found=f"{type(error).__name__}: {str(error)[:500]}",
                fix=f"read {log}; try another export.opset (18 and 22 are tested)",
            ) from error
