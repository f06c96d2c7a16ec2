"""Check that the sections of params.yaml fit together before anything expensive starts."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from diffusion_engines.backends import backend
from diffusion_engines.errors import ConfigError, WeightsError
from diffusion_engines.families import family_of

# Of PyTorch 2.11 to 2.13, each tried. The dynamo exporter answers 12 to 14 with 18 and exits 0.
OPSETS = {"dynamo": range(17, 25), "torchscript": range(14, 24)}
OPSETS_WITH_EXPLICIT_ATTENTION = {"dynamo": range(17, 25), "torchscript": range(12, 24)}
# https://onnx.ai/onnx/operators/onnx__Conv.html
BF16_OPSET = 22
# What each quantized precision is made from. Calibration runs in ONNX Runtime, which has no bf16
# convolution on the CPU; mixed precision chooses what leaves fp32.
SOURCES = {"int8": ("fp16", "fp32"), "fp8": ("fp16", "fp32"), "fp16-mixed": ("fp32",)}


def check_fleet(params: dict[str, Any]) -> None:
    """Check exports, targets, engines and measure against each other.

    Raises:
        ConfigError: lists everything that does not fit.
    """
    problems = [
        *_loras(params),
        *_export_settings(params),
        *_components(params),
        *_exports(params),
        *_targets(params),
        *_quantized(params),
        *_engines(params),
        *_measure(params),
        *_timing(params),
        *_generate(params),
        *_guidance(params),
    ]
    if problems:
        raise ConfigError(
            f"{len(problems)} problem(s) in the fleet:\n  - " + "\n  - ".join(problems),
            fix="edit the files named, then compose again with `make params`",
        )


def _loras(params: dict[str, Any]) -> list[str]:
    problems, seen = [], set()
    for index, lora in enumerate(params["model"].loras):
        key, path = f"model.loras.{index}", PurePosixPath(lora.file)
        if lora.weight == 0:
            problems.append(
                f"{key}.weight: 0 changes nothing; for a run without {lora.file}, leave it out of "
                "the list: `model.loras=[]` (conf/lora/)"
            )
        if path.suffix != ".safetensors":
            problems.append(
                f"{key}.file: only safetensors are read, pickles can run code when loaded; found "
                f"{lora.file} (conf/lora/)"
            )
        if path.is_absolute() or ".." in path.parts:
            problems.append(
                f"{key}.file: expected a path below model.lora_folder "
                f"({params['model'].lora_folder}), which DVC watches; found {lora.file}: move the "
                "file there, or set model.lora_folder (conf/lora/)"
            )
        if path in seen:
            problems.append(
                f"{key}.file: {lora.file} is listed twice; add up its weights (conf/lora/)"
            )
        seen.add(path)
    return problems


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


def _components(params: dict[str, Any]) -> list[str]:
    """What a fleet builds must be components of the model's family."""
    model = params["model"]
    try:
        family = family_of(Path(model.folder))
    except (ConfigError, WeightsError) as error:
        return [f"model.folder: {error.problem}; found {error.found} (conf/model/)"]
    problems = [
        f"{section}.{key}: the model {model.name} has no {item.component}; as a "
        f"{family.class_name} it has {', '.join(family.components)} (conf/fleet/)"
        for section in ("exports", "quantized", "engines")
        for key, item in params[section].items()
        if item.component not in family.components
    ]
    for key, item in params["exports"].items():
        component = family.components.get(item.component)
        if component is not None and item.weights != component.folder:
            problems.append(f"exports.{key}.weights: expected {component.folder} (conf/fleet/)")
    return problems


def _exports(params: dict[str, Any]) -> list[str]:
    problems = []
    for key, item in params["exports"].items():
        if key != (expected := f"{item.component}-{item.precision}"):
            problems.append(f"exports.{key}: expected the key {expected} (conf/fleet/)")
        if item.precision == "bf16" and params["export"].opset < BF16_OPSET:
            problems.append(
                f"exports.{key}.precision: ONNX has bf16 convolutions from opset {BF16_OPSET} on, "
                f"export.opset is {params['export'].opset} (conf/export/)"
            )
        if item.precision not in params["simplify"].rel_l2:
            problems.append(f"simplify.rel_l2.{item.precision}: missing (conf/simplify/)")
    return problems


def _targets(params: dict[str, Any]) -> list[str]:
    problems = []
    for key, target in params["targets"].items():
        engines = [engine for engine in params["engines"].values() if engine.target == key]
        found = backend(target.backend).check(target, {engine.precision for engine in engines})
        problems += [f"targets.{key}.{text}" for text in found]
    return problems


def _quantized(params: dict[str, Any]) -> list[str]:
    problems = []
    for key, item in params["quantized"].items():
        if key != (expected := f"{item.component}-{item.precision}"):
            problems.append(f"quantized.{key}: expected the key {expected} (conf/fleet/)")
        if item.source not in (sources := SOURCES[item.precision]):
            problems.append(
                f"quantized.{key}.source: {item.precision} is made from {' or '.join(sources)}, "
                f"found {item.source} (conf/fleet/)"
            )
        if item.onnx not in params["exports"]:
            problems.append(
                f"quantized.{key}: needs exports.{item.onnx}, which the fleet does not list "
                "(conf/fleet/)"
            )
        for pattern in params["quantize"].settings(item.precision).kept.get(item.component, []):
            try:
                re.compile(pattern)
            except re.error as error:
                problems.append(
                    f"quantize.{item.precision}.kept.{item.component}: {pattern!r} is no regular "
                    f"expression: {error} (conf/quantize/)"
                )
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
        if engine.precision not in (has := backend(target.backend).precisions):
            problems.append(
                f"engines.{key}.precision: the backend {target.backend} has {', '.join(has)}, "
                f"not {engine.precision} (conf/fleet/)"
            )
        section = "quantized" if engine.precision in SOURCES else "exports"
        if engine.onnx not in params[section]:
            problems.append(
                f"engines.{key}: needs {section}.{engine.onnx}, which the fleet does not list "
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


def _timing(params: dict[str, Any]) -> list[str]:
    return [
        f"timing.{key}: expected a target with engines whose builds keep a timing cache, as "
        "TensorRT's with build.timing_cache=true (conf/fleet/)"
        for key in params["timing"]
        if not (
            (target := params["targets"].get(key))
            and backend(target.backend).timing(target)
            and any(engine.target == key for engine in params["engines"].values())
        )
    ]


def _generate(params: dict[str, Any]) -> list[str]:
    if params["generate"].folder is None:
        return []
    return [
        "generate.folder: for runs by hand, DVC expects the images in artifacts/images/; "
        "expected null (conf/generate/)"
    ]


def _guidance(params: dict[str, Any]) -> list[str]:
    if params["image"].guidance:
        return []
    return [
        f"{section}.guidance_scale: the model {params['model'].name} is built without guidance "
        f"(image.guidance), expected 1.0, found {params[section].guidance_scale} "
        f"(conf/{section}/; {section}=few_steps)"
        for section in ("reference", "benchmark", "generate")
        if params[section].guidance_scale > 1.0
    ]
