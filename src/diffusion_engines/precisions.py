"""The precisions that engines can have: one table, from the one that costs least accuracy.

Which of them a backend builds is the backend's to say (``backends/``), what an engine in one may
differ from the reference the config's (``conf/validate/``). Imports the standard library alone: DVC
reads this table whenever it composes ``conf/``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """What follows from a precision, wherever a graph or an engine has it.

    Attributes:
        name: in ``conf/``, e.g. ``fp16-mixed``.
        dtype: of the layers that make it, as engines are asked for it: another precision's name
            where only a part of the graph is in it.
        torch_dtype: of inputs and outputs whose dtype is "component", as PyTorch names it; None:
            that of the graph that it was made from.
        onnx_dtype: ``dtype`` as ONNX's TensorProto names it.
        sources: precisions of the graphs that it can be made from, the preferred one first; empty:
            it is exported as it is.
        every_layer: whether most layers must have ``dtype``; else some, as others are kept higher.
        capability: the first compute capability whose tensor cores have it.
            https://docs.nvidia.com/deeplearning/tensorrt/latest/getting-started/support-matrix.html
        opset: the first of ONNX that has convolutions in it.
            https://onnx.ai/onnx/operators/onnx__Conv.html
    """

    name: str
    dtype: str
    torch_dtype: str | None
    onnx_dtype: str
    sources: tuple[str, ...] = ()
    every_layer: bool = True
    capability: float = 0.0
    opset: int = 1

    @property
    def exported(self) -> bool:
        """Whether exporters write it; else the stage ``quantize`` makes it."""
        return not self.sources


# In the order of what they cost: a whole run is judged by the last one among its components.
# Calibration runs in ONNX Runtime, which has no bf16 convolution on the CPU, hence the sources.
PRECISIONS: Mapping[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision("fp32", "fp32", "float32", "FLOAT"),
        Precision("fp16-mixed", "fp16", "float32", "FLOAT16", sources=("fp32",), every_layer=False),
        Precision("fp16", "fp16", "float16", "FLOAT16"),
        Precision("bf16", "bf16", "bfloat16", "BFLOAT16", capability=8.0, opset=22),
        Precision("int8", "int8", None, "INT8", sources=("fp16", "fp32"), every_layer=False),
        Precision(
            "fp8",
            "fp8",
            None,
            "FLOAT8E4M3FN",
            sources=("fp16", "fp32"),
            every_layer=False,
            capability=8.9,
        ),
    )
}


def lowest(names: list[str]) -> str:
    """Return the precision that costs most among those named."""
    return max(names, key=list(PRECISIONS).index)


def graph_name(component: str, precision: str, graph_format: str = "onnx") -> str:
    """Return the name of the graph of a component in a precision, e.g. ``unet-fp16``.

    That of another format than ONNX says so: ``unet-fp16-exported_program``.
    """
    return "-".join([component, precision, *([graph_format] if graph_format != "onnx" else [])])


def of_onnx_dtypes(names: Iterable[str]) -> dict[str, int]:
    """Return how many dtypes, as ONNX's TensorProto names them, have each precision.

    What is of none, such as int64, is left out.
    """
    known = {p.onnx_dtype: p.name for p in PRECISIONS.values() if p.name == p.dtype}
    return dict(Counter(known[name] for name in names if name in known))
