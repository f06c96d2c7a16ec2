"""ONNX graphs on disk: their names, how they are written, and whether they are valid."""

from __future__ import annotations

from pathlib import Path

import onnx

from diffusion_engines.errors import ExportError

MODEL = "model.onnx"
DATA = "model.onnx.data"

# Tensors below this stay in the graph file, where shape inference and parsers look for them.
_EXTERNAL_BYTES = 1024


def save_with_external_data(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph to ``path`` with its weights in one file beside it."""
    path.with_name(DATA).unlink(missing_ok=True)  # onnx appends to a file that exists
    onnx.save(
        model,
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=DATA,
        size_threshold=_EXTERNAL_BYTES,
    )
    let_others_read(path)


def let_others_read(path: Path) -> None:
    """Give a graph's external data its permissions: onnx keeps it from who shares a cache."""
    if (data := path.with_name(DATA)).is_file():
        data.chmod(path.stat().st_mode)


def check_graph(path: Path, *, opset: int, writer: str, outputs: int | None = None) -> None:
    """Check the opset, the names, and every type and shape of a graph on disk.

    Args:
        path: of the graph.
        opset: that it must have.
        writer: what wrote it, for errors.
        outputs: how many it must have, where that is known.

    Raises:
        ExportError: see there; the TorchScript exporter writes an invalid fp16 text encoder, and
            the dynamo exporter answers some opsets with another one, and both exit without error.
    """
    model = onnx.load(path, load_external_data=False)
    written = opset_of(model)
    if written != opset:
        raise ExportError(
            f"{writer} wrote another opset than asked for (export.opset)",
            expected=str(opset),
            found=str(written),
            fix=f"ask for {written}, or for one that it has: dynamo 17 to 24, torchscript 14 to\n"
            "23 (12 and 13 with export.patches=[explicit_attention])",
        )
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"{writer} wrote an invalid graph",
            expected="a graph that passes onnx.checker with full type and shape checks",
            found=first_lines(error),
            fix="use export.exporter=dynamo, another export.opset, or another precision",
        ) from error
    names = [value.name for value in (*model.graph.input, *model.graph.output)]
    count = len(model.graph.output) if outputs is None else outputs
    expected = [f"input_{i}" for i in range(len(model.graph.input))]
    expected += [f"output_{i}" for i in range(count)]
    if names != expected:
        raise ExportError(
            "inputs and outputs have other names than engines need",
            expected=", ".join(expected),
            found=", ".join(names),
            fix="this is a defect of the export stage: please report it",
        )


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of the default operator set that a graph uses."""
    return next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))


def first_lines(error: BaseException, lines: int = 6) -> str:
    """Shorten an exception's text to what a person reads."""
    return "\n".join(str(error).strip().splitlines()[:lines])
