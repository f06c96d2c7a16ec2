"""Write an exported program that calls a plan: ``writing.py BACKEND FITS PLAN TARGET SPECS``.

``FITS`` is ``others`` for a plan that runs on other models of GPU too, else ``one``; ``SPECS`` are
the inputs as JSON.
"""

from __future__ import annotations

import importlib
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from diffusion_engines.backends.nvidia.running import binding_names
from diffusion_engines.backends.nvidia.wrapping.exported_program import SPECS
from diffusion_engines.errors import BuildError
from diffusion_engines.families.base import Dim, TensorSpec
from diffusion_engines.runtime.open_dims import shapes_of_dims, traceable

# The name by which torch_tensorrt's exporter knows a module that is an engine.
_ENGINE = "_run_on_acc_0"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Multiple:
    """A dimension of an output: that of an input, times a factor."""

    input: int
    axis: int
    factor: int


Sizes = Sequence[int | Multiple]


def follow_sizes(
    specs: Sequence[TensorSpec], shapes_for: Callable[[Sequence[Shape]], Sequence[Shape]]
) -> list[list[int | Multiple]]:
    """Return how the sizes of outputs follow from those of inputs, found out by asking.

    Args:
        specs: of the inputs.
        shapes_for: returns the shapes of the outputs for some of the inputs.

    Raises:
        BuildError: a size is neither fixed nor a multiple of one of an input.
    """
    usual = [tuple(shape) for shape in shapes_for([spec.size for spec in specs])]
    found: list[list[int | Multiple]] = [[*shape] for shape in usual]
    places: dict[str, tuple[int, int, Dim]] = {}
    for index, spec in enumerate(specs):
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, Dim):
                places.setdefault(dim.name, (index, axis, dim))
    for name, (index, axis, dim) in places.items():
        other = dim.min if dim.min != dim.size else dim.max
        if other == dim.size:
            continue  # open in name alone
        changed = [_resized(spec, name, other) for spec in specs]
        for sizes, old, new in zip(found, usual, shapes_for(changed), strict=True):
            for place, (was, now) in enumerate(zip(old, new, strict=True)):
                if was == now:
                    continue
                factor = was // dim.size
                if (was, now) != (factor * dim.size, factor * other):
                    raise BuildError(
                        f"a size of an output does not follow from {name} of the inputs",
                        expected=f"a multiple of {name}",
                        found=f"{was} at {dim.size}, {now} at {other}",
                        fix="leave exported_program out of targets.*.wrap",
                    )
                sizes[place] = Multiple(index, axis, factor)
    return found


def _resized(spec: TensorSpec, name: str, size: int) -> Shape:
    return tuple(
        size if isinstance(dim, Dim) and dim.name == name else usual
        for dim, usual in zip(spec.shape, spec.size, strict=True)
    )


class _Shapes(nn.Module):
    """Stands for the engine while PyTorch traces how sizes follow from sizes."""

    def __init__(self, outputs: Sequence[tuple[Sizes, torch.dtype]]) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(
            inputs[0].new_zeros(
                [
                    size
                    if isinstance(size, int)
                    else inputs[size.input].shape[size.axis] * size.factor
                    for size in sizes
                ],
                dtype=dtype,
            )
            for sizes, dtype in self.outputs
        )


def examples_of(
    specs: Sequence[TensorSpec], dtypes: Sequence[torch.dtype], device: str
) -> tuple[tuple[torch.Tensor, ...], tuple[dict[int, Any] | None, ...]]:
    """Return a tensor for each input, and its open dimensions as torch.export takes them."""
    traced = tuple(traceable(spec) for spec in specs)
    tensors = tuple(
        torch.zeros(spec.size, dtype=dtype, device=device)
        for spec, dtype in zip(traced, dtypes, strict=True)
    )
    return tensors, shapes_of_dims(traced)


def graph_of_engine(
    engine: nn.Module,
    inputs: Mapping[str, torch.dtype],
    specs: Sequence[TensorSpec],
    outputs: Sequence[tuple[Sizes, torch.dtype]],
    device: str = "cuda",
) -> fx.GraphModule:
    """Return a graph that calls an engine, in the form that torch_tensorrt's exporter takes.

    Args:
        engine: a ``TorchTensorRTModule``.
        inputs: dtypes by name, in order.
        specs: of the inputs.
        outputs: sizes and dtype of each, in order.
        device: of the tensors.
    """
    examples, dims = examples_of(specs, [*inputs.values()], device)
    dynamic = (dims,) if any(spec.dynamic for spec in specs) else None
    stand_in = torch.export.export(_Shapes(outputs), examples, dynamic_shapes=dynamic).graph
    taken = [node.meta["val"] for node in stand_in.nodes if node.op == "placeholder"]
    given = [node.meta["val"] for node in stand_in.output_node().args[0]]

    graph = fx.Graph()
    places = []
    for name, value in zip(inputs, taken, strict=True):
        places.append(graph.placeholder(name))
        places[-1].meta["val"] = value
    call = graph.call_module(_ENGINE, tuple(places))
    call.meta["val"] = given
    results = [call]
    if len(given) > 1:
        results = [graph.call_function(operator.getitem, (call, i)) for i in range(len(given))]
    graph.output(tuple(results))
    # A tensor where there is one, as of a plan and of TorchScript; else a tuple.
    whole: Any = given[0] if len(given) == 1 else tuple(given)
    arguments: Any = (tuple(taken), {})
    trees = [pytree.tree_structure(tree) for tree in (arguments, whole)]
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo([*inputs], *trees)))
    return fx.GraphModule(nn.ModuleDict({_ENGINE: engine}), graph)


def write(
    backend: str, hardware_compatible: bool, plan: Path, target: Path, specs: Sequence[TensorSpec]
) -> None:
    """Write the program, by torch_tensorrt."""
    torch_tensorrt = importlib.import_module("torch_tensorrt")
    dynamo = importlib.import_module("torch_tensorrt.dynamo")
    trt: Any = importlib.import_module(backend)
    dtypes = {
        trt.float32: torch.float32,
        trt.float16: torch.float16,
        trt.bfloat16: torch.bfloat16,
        trt.int32: torch.int32,
        trt.int64: torch.int64,
    }
    content = plan.read_bytes()
    inputs, outputs, sizes = _bindings(trt, content, specs)
    module = torch_tensorrt.runtime.TorchTensorRTModule(
        content,
        [*inputs],
        [*outputs],
        name=plan.stem,
        settings=dynamo.CompilationSettings(hardware_compatible=hardware_compatible),
    )
    graph = graph_of_engine(
        module,
        {name: dtypes[dtype] for name, dtype in inputs.items()},
        specs,
        [(of, dtypes[dtype]) for of, dtype in zip(sizes, outputs.values(), strict=True)],
        _DEVICE,
    )
    examples, dims = examples_of(specs, [dtypes[dtype] for dtype in inputs.values()], _DEVICE)
    torch_tensorrt.save(
        graph,
        str(target),
        output_format="exported_program",
        retrace=False,
        # For the ranges of open sizes: what is traced leaves out a batch of 1.
        arg_inputs=examples,
        dynamic_shapes=dims,
    )


def _bindings(
    trt: Any, content: bytes, specs: Sequence[TensorSpec]
) -> tuple[dict[str, Any], dict[str, Any], list[list[int | Multiple]]]:
    """Return the inputs and the outputs of a plan with their dtypes, and the outputs' sizes."""
    engine = trt.Runtime(trt.Logger(trt.Logger.WARNING)).deserialize_cuda_engine(content)
    context = engine.create_execution_context()
    inputs, outputs = binding_names(trt, engine)

    def shapes_for(shapes: Sequence[Shape]) -> list[Shape]:
        for name, shape in zip(inputs, shapes, strict=True):
            context.set_input_shape(name, shape)
        return [tuple(context.get_tensor_shape(name)) for name in outputs]

    found = [{name: engine.get_tensor_dtype(name) for name in of} for of in (inputs, outputs)]
    return found[0], found[1], follow_sizes(specs, shapes_for)


def try_once(target: Path, specs: Sequence[TensorSpec]) -> None:
    """Load the file as a user would, and run it once at the usual sizes."""
    program = torch.export.load(target)
    taken = set(program.graph_signature.user_inputs)
    dtypes = [node.meta["val"].dtype for node in program.graph.nodes if node.name in taken]
    tensors = [
        torch.zeros(spec.size, dtype=dtype, device=_DEVICE)
        for spec, dtype in zip(specs, dtypes, strict=True)
    ]
    program.module()(*tensors)
    torch.cuda.synchronize()


_DEVICE = "cuda"

if __name__ == "__main__":
    library, fits, *files, inputs_json = sys.argv[1:]
    of_inputs = SPECS.validate_json(inputs_json)
    write(library, fits == "others", Path(files[0]), Path(files[1]), of_inputs)
    try_once(Path(files[1]), of_inputs)
