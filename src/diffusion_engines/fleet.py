"""Check that the sections of params.yaml fit together before anything expensive starts."""

from __future__ import annotations

from typing import Any

from diffusion_engines.backends import backend
from diffusion_engines.components import COMPONENTS
from diffusion_engines.errors import ConfigError

# Of PyTorch 2.11 to 2.13, each tried. The dynamo exporter answers 12 to 14 with 18 and exits 0.
OPSETS = {"dynamo": range(17, 25), "torchscript": range(14, 24)}
OPSETS_WITH_EXPLICIT_ATTENTION = {"dynamo": range(17, 25), "torchscript": range(12, 24)}
# https://onnx.ai/onnx/operators/onnx__Conv.html
BF16_OPSET = 22


def check_fleet(params: dict[str, Any]) -> None:
    """Check exports, targets, engines and measure against each other.

    Raises:
        ConfigError: lists everything that does not fit.
    """
    problems = [
        *_export_settings(params),
        *_exports(params),
        *_engines(params),
        *_measure(params),
        *_generate(params),
    ]
    if problems:
        raise ConfigError(
            f"{len(problems)} problem(s) in the fleet:\n  - " + "\n  - ".join(problems),
            fix="edit the files named, then compose again with `make params`",
        )


def _export_settings(params: dict[str, Any]) -> list[str]:
    export, problems = params["export"], []
    explicit = "explicit_attention" in export.patches
    known = (OPSETS_WITH_EXPLICIT_ATTENTION if explicit else OPSETS)[export.exporter]
    if export.opset not in known:
        hint = ""
        if not explicit and export.opset in OPSETS_WITH_EXPLICIT_ATTENTION[export.exporter]:
            hint = ", or with export.patches=[explicit_attention]"
        problems.append(
            f"export.opset: the {export.exporter} exporter lacks opset {export.opset}; expected "
            f"{known.start} to {known.stop - 1}{hint} (conf/export/)"
        )
    for name in ("batch_size", "height", "width"):
        bounds = getattr(export.dynamic, name)
        size = getattr(params["image"], name)
        if bounds and not bounds[0] <= size <= bounds[1]:
            problems.append(
                f"export.dynamic.{name}: image.{name} {size} is outside {bounds} (conf/export/)"
            )
    return problems


def _exports(params: dict[str, Any]) -> list[str]:
    problems = []
    for key, item in params["exports"].items():
        if key != (expected := f"{item.component}-{item.precision}"):
            problems.append(f"exports.{key}: expected the key {expected} (conf/fleet/)")
        if item.weights != (folder := COMPONENTS[item.component].folder):
            problems.append(f"exports.{key}.weights: expected {folder} (conf/fleet/)")
        if item.precision == "bf16" and params["export"].opset < BF16_OPSET:
            problems.append(
                f"exports.{key}.precision: ONNX has bf16 convolutions from opset {BF16_OPSET} on, "
                f"export.opset is {params['export'].opset} (conf/export/)"
            )
        if item.precision not in params["simplify"].rel_l2:
            problems.append(f"simplify.rel_l2.{item.precision}: missing (conf/simplify/)")
    return problems


def _engines(params: dict[str, Any]) -> list[str]:
    problems = []
    for key, engine in params["engines"].items():
        if engine.target not in params["targets"]:
            known = ", ".join(sorted(params["targets"]))
            problems.append(
                f"engines.{key}.target: no target {engine.target}; there are {known} (conf/fleet/)"
            )
            continue
        target = params["targets"][engine.target]
        if key != (expected := f"{engine.target}-{engine.component}"):
            problems.append(f"engines.{key}: expected the key {expected} (conf/fleet/)")
        if engine.backend != target.backend:
            problems.append(
                f"engines.{key}.backend: expected {target.backend}, as targets.{engine.target} "
                f"has it, found {engine.backend} (conf/fleet/)"
            )
        if engine.precision not in (has := backend(target.backend).PRECISIONS):
            problems.append(
                f"engines.{key}.precision: the backend {target.backend} has {', '.join(has)}, "
                f"not {engine.precision} (conf/fleet/)"
            )
        if engine.onnx not in params["exports"]:
            problems.append(
                f"engines.{key}: needs exports.{engine.onnx}, which the fleet does not list "
                "(conf/fleet/)"
            )
    return problems


def _measure(params: dict[str, Any]) -> list[str]:
    known = {engine.target for engine in params["engines"].values()}
    return [
        f"measure.{key}: no engine is built for this target (conf/fleet/)"
        for key in params["measure"]
        if key not in known
    ]


def _generate(params: dict[str, Any]) -> list[str]:
    if params["generate"].folder is None:
        return []
    return [
        "generate.folder: for runs by hand, DVC expects the images in artifacts/images/; "
        "expected null (conf/generate/)"
    ]
