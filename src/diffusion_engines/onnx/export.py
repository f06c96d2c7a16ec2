"""Write a PyTorch module as an ONNX graph and check that it is the one that was asked for."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
import torch
from torch import nn
from torch.jit._trace import TracerWarning

from diffusion_engines.errors import ExportError
from diffusion_engines.families.base import Dim, TensorSpec
from diffusion_engines.onnx.graph import (
    MODEL,
    check_graph,
    first_lines,
    save_with_external_data,
)
from diffusion_engines.onnx.patches import applied
from diffusion_engines.onnx.tracing import shapes_alone
from diffusion_engines.runtime.networks import example_inputs
from diffusion_engines.runtime.open_dims import shapes_of_dims, traceable


def export_module(
    module: nn.Module,
    inputs: tuple[TensorSpec, ...],
    folder: Path,
    *,
    precision: str,
    exporter: str,
    opset: int,
    patches: list[str],
    outputs: Sequence[str] = ("output_0",),
    vocabulary: int = 0,
) -> None:
    """Write ``model.onnx`` and its weights, ``model.onnx.data``, into ``folder``.

    Inputs and outputs are named ``input_0…`` and ``output_0…``: torchtrtc orders an engine's
    bindings by the trailing number. Weights are always external, so that no graph meets protobuf's
    limit of 2 GB.

    Raises:
        ExportError: the exporter failed, wrote another opset than asked for, or an invalid graph.
    """
    specs = tuple(traceable(spec) for spec in inputs)
    args = example_inputs(specs, precision, vocabulary=vocabulary)
    write = {"dynamo": _export_dynamo, "torchscript": _export_torchscript}[exporter]
    try:
        with applied(patches), _quiet(), torch.no_grad():
            write(module, args, specs, list(outputs), folder / MODEL, opset)
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
        raise ExportError(
            f"the {exporter} exporter failed at opset {opset}",
            found=f"{type(_root(error)).__name__}: {first_lines(_root(error))}",
            fix=_remedy(error, exporter),
        ) from error
    writer = f"the {exporter} exporter"
    check_graph(folder / MODEL, opset=opset, writer=writer, outputs=len(outputs))


def _export_dynamo(
    module: nn.Module,
    args: tuple[torch.Tensor, ...],
    specs: tuple[TensorSpec, ...],
    outputs: list[str],
    path: Path,
    opset: int,
) -> None:
    program = torch.onnx.export(
        module,
        args,
        dynamo=True,
        opset_version=opset,
        input_names=[spec.name for spec in specs],
        output_names=outputs,
        # In a tuple once more: a component's module takes its inputs as *tensors.
        dynamic_shapes=(shapes_of_dims(specs),) if any(spec.dynamic for spec in specs) else None,
        verbose=False,
    )
    assert program is not None
    # Stack traces hold the paths of this machine: with them, no two machines' exports are equal.
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
        if opset < 18 and node.op_type == "Split":
            # Written at 18 and converted down, where this attribute does not exist and equal
            # parts are what a Split without sizes means. torch 2.13 leaves it, which is invalid.
            node.attributes.pop("num_outputs", None)
    program.save(path, external_data=True)


def _export_torchscript(
    module: nn.Module,
    args: tuple[torch.Tensor, ...],
    specs: tuple[TensorSpec, ...],
    outputs: list[str],
    path: Path,
    opset: int,
) -> None:
    open_axes = {
        spec.name: {axis: d.name for axis, d in enumerate(spec.shape) if isinstance(d, Dim)}
        for spec in specs
        if spec.dynamic
    }
    raw = path.with_name("raw")
    raw.mkdir()
    with shapes_alone():
        torch.onnx.export(
            module,
            args,
            str(raw / MODEL),  # of a Path it does not know where weights beyond 2 GB go
            dynamo=False,
            opset_version=opset,
            input_names=[spec.name for spec in specs],
            output_names=outputs,
            dynamic_axes=open_axes or None,
            do_constant_folding=True,
        )
    save_with_external_data(onnx.load(raw / MODEL), path)
    for file in raw.iterdir():
        file.unlink()
    raw.rmdir()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the exporters say on every run and no user can act on."""
    # "torchvision is not installed. Skipping …"; and the converter's traceback where an opset
    # cannot be had, which `check_graph` says in a line.
    loggers = {logging.getLogger(name): 0 for name in ("torch.onnx", "onnxscript")}
    for logger in loggers:
        loggers[logger] = logger.level
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # Tracing notes each branch that depends on a shape; shapes are static here.
        warnings.simplefilter("ignore", category=TracerWarning)
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        warnings.filterwarnings("ignore", message=".*legacy TorchScript-based.*")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.onnx.*")
        try:
            yield
        finally:
            for logger, level in loggers.items():
                logger.setLevel(level)


def _root(error: BaseException) -> BaseException:
    """Return what an exporter's exception was raised from: its own text is advice to developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _remedy(error: BaseException, exporter: str) -> str:
    text = str(error)
    if "scaled_dot_product_attention" in text and "not supported" in text:
        return "add the patch that replaces it: export.patches=[explicit_attention]"
    if exporter == "torchscript":
        return "ask for an opset from 14 to 23, or use export.exporter=dynamo"
    return "ask for an opset from 17 to 24, or use export.exporter=torchscript"
