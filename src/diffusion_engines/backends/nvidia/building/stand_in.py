"""Build from a graph's structure alone: with values that stand in for its weights.

TensorRT's parser wants a value for every constant, and a builder must not depend on those that a
later refit may change (``BuilderFlag.REFIT``). They are the same ones for all weights of a network,
so that its fine-tunes share one plan bit for bit. NVIDIA's own tools do so too: `polygraphy surgeon
weight-reconstruct` fills what `weight-strip` took out of a graph.
https://github.com/NVIDIA/TensorRT/tree/main/tools/Polygraphy/examples/cli/surgeon
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx.external_data_helper import ExternalDataInfo

from diffusion_engines.backends.base import Graph
from diffusion_engines.backends.nvidia.settings import Weights

# Of the size that weights of diffusion models have: kernels are timed on such numbers, zeros would
# draw less power. No two tensors have the same, for equal constants could become one.
_DEVIATION = 0.02
_DISTINCT = 1 << 16


@contextmanager
def buildable(graph: Graph, folder: Path, weights: Weights) -> Iterator[Graph]:
    """Yield what a builder is given: where weights are stripped, with others in their place.

    Args:
        graph: whose weights, where they are stripped, are external data, and nothing else is; they
            are not read then, and may be missing.
        folder: where the other graph lies meanwhile; of the size of the weights.
        weights: what becomes of them.
    """
    if weights != "stripped":
        yield graph
        return
    filled = folder / "stand-in"
    filled.mkdir()
    try:
        shutil.copyfile(graph.path, filled / graph.path.name)
        _write_values(graph.path, filled)
        yield replace(graph, path=filled / graph.path.name)
    finally:
        shutil.rmtree(filled)


def weights_of(path: Path) -> list[onnx.TensorProto]:
    """Return the tensors of a graph on disk that are external data, without it."""
    model = onnx.load(path, load_external_data=False)
    external = onnx.TensorProto.EXTERNAL
    return [tensor for tensor in model.graph.initializer if tensor.data_location == external]


def _write_values(path: Path, folder: Path) -> None:
    for index, tensor in enumerate(weights_of(path)):
        info = ExternalDataInfo(tensor)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        count = int(np.prod(tensor.dims))
        drawn = np.random.default_rng(index).standard_normal(min(count, _DISTINCT), np.float32)
        values = np.resize((drawn * _DEVIATION).astype(dtype), count)
        file = folder / info.location
        with file.open("r+b" if file.exists() else "wb") as stream:
            stream.seek(info.offset or 0)
            stream.write(values.tobytes())
