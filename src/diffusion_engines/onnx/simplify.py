"""Simplify a graph with onnxsim, and check that it still computes the same."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxsim
from google.protobuf.message import DecodeError
from onnx.checker import ValidationError

from diffusion_engines.errors import ExportError
from diffusion_engines.names import trailing_number
from diffusion_engines.onnx.graph import MODEL
from diffusion_engines.onnx.session import NUMPY, feeds_of, session_of
from diffusion_engines.onnx.structure import save_with_weights_apart
from diffusion_engines.progress import step


def simplify_graph(source: Path, folder: Path, *, skipped_optimizers: list[str]) -> None:
    """Write the simplified graph of ``source`` into ``folder``, its weights in a file of their own.

    onnxsim works from file to file: half the memory and time of working on a loaded model.

    Raises:
        ExportError: onnxsim failed.
    """
    # Below 2 GB onnxsim keeps the weights inside the graph file; from there on it puts them beside
    # it, under a name of its own. A folder that is removed leaves no second copy of either.
    raw = folder / "raw"
    raw.mkdir()
    with step("onnxsim"):
        try:
            onnxsim.simplify(
                str(source), output_path=str(raw / MODEL), skipped_optimizers=skipped_optimizers
            )
        except (RuntimeError, ValueError, ValidationError, DecodeError) as error:
            raise ExportError(
                f"onnxsim could not simplify {source}",
                found=f"{type(error).__name__}: {str(error)[:500]}",
                fix="name the optimizer that fails in simplify.skipped_optimizers",
            ) from error
    with step("write structure and weights"):
        save_with_weights_apart(onnx.load(raw / MODEL), folder / MODEL)
    shutil.rmtree(raw)


def check_same_results(
    before: Path,
    after: Path,
    *,
    allowed: float,
    inputs: Sequence[Any] | None = None,
    seed: int = 0,
) -> float | None:
    """Return the relative L2 error between two graphs, None where neither can be run here.

    Args:
        before: a graph.
        after: what onnxsim made of it.
        allowed: the largest error.
        inputs: tensors, such as a recorded call has; None: random ones of ``seed``.
        seed: of these.

    Raises:
        ExportError: the error exceeds ``allowed``.
    """
    model = onnx.load(after, load_external_data=False)
    if any(i.data_type == onnx.TensorProto.BFLOAT16 for i in model.graph.initializer):
        print("  not compared numerically: ONNX Runtime's CPU kernels have no bf16")
        return None
    error = relative_l2_between(before, after, inputs=inputs, seed=seed)
    print(f"  relative L2 error of the simplified graph: {error:.2e} (allowed {allowed:.0e})")
    if not error <= allowed:  # also when it is NaN
        raise ExportError(
            f"onnxsim changed what {before.parent.name} computes",
            expected=f"a relative L2 error of at most {allowed:.1e} (simplify.rel_l2)",
            found=f"{error:.1e}",
            fix="name the optimizer at fault in simplify.skipped_optimizers",
        )
    return error


def relative_l2_between(
    before: Path, after: Path, *, inputs: Sequence[Any] | None = None, seed: int = 0
) -> float:
    """Run both graphs in ONNX Runtime on the same inputs; return their relative L2 error.

    Of several outputs, it is that of the one that differs most. In random inputs, as of
    :func:`check_same_results`, open dimensions are 2 (batch) and 16 (edges).

    Raises:
        ExportError: a graph cannot be run.
    """
    runs = []
    for label, path in (("before", before), ("after", after)):
        with step(f"run the graph {label} simplification"):
            runs.append(_run(path, inputs, seed))
    # np.max and not max: of an output that is NaN, it is NaN.
    return float(np.max([_relative_l2(*outputs) for outputs in zip(*runs, strict=True)]))


def _relative_l2(reference: np.ndarray, result: np.ndarray) -> float:
    reference, result = reference.astype(np.float64), result.astype(np.float64)
    norm = max(float(np.linalg.norm(reference)), 1e-30)
    return float(np.linalg.norm(result - reference)) / norm


def _run(path: Path, inputs: Sequence[Any] | None, seed: int) -> list[np.ndarray]:
    session = session_of(path)
    if inputs is None:
        feeds = _random_feeds(session.get_inputs(), seed)
    else:
        feeds = feeds_of(session.get_inputs(), inputs)
    # By number: onnxsim may list the outputs in another order.
    names = sorted((value.name for value in session.get_outputs()), key=trailing_number)
    return session.run(names, feeds)


def _random_feeds(inputs: Sequence[Any], seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    feeds = {}
    for value in inputs:
        shape = [_size(dim, axis) for axis, dim in enumerate(value.shape)]
        dtype = NUMPY[value.type]
        if dtype is np.int64:
            feeds[value.name] = generator.integers(0, 256, shape)
        elif len(shape) == 1:
            feeds[value.name] = np.full(shape, 500.0, dtype)
        else:
            feeds[value.name] = generator.standard_normal(shape).astype(dtype)
    return feeds


def _size(dim: int | str | None, axis: int) -> int:
    if isinstance(dim, int):
        return dim
    return 2 if axis == 0 else 16
