"""Check that the sections of params.yaml fit together before anything expensive starts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from diffusion_engines.backends import backend
from diffusion_engines.backends.base import Target
from diffusion_engines.config import ENGINES
from diffusion_engines.errors import ConfigError, IntegrityError, WeightsError
from diffusion_engines.families import family_of
from diffusion_engines.families.base import SCHEDULER_CONFIG, Family
from diffusion_engines.files import read_json
from diffusion_engines.onnx.patches import PATCHES
from diffusion_engines.precisions import PRECISIONS

# Of PyTorch 2.11 to 2.13, each tried. The dynamo exporter answers 12 to 14 with 18 and exits 0.
OPSETS = {"dynamo": range(17, 25), "torchscript": range(14, 24)}
OPSETS_WITH_EXPLICIT_ATTENTION = {"dynamo": range(17, 25), "torchscript": range(12, 24)}
_COMMIT = re.compile(r"[0-9a-f]{40}")
# What the stage check_conf writes: a constant, so that nothing runs because it ran.
CHECKED = {"conf": "checked"}


def check_params(params: dict[str, Any], root: Path) -> None:
    """Check the sections of params.yaml, each well typed, against each other.

    Args:
        params: every section, typed.
        root: of the repository, which ``model.folder`` is relative to.

    Raises:
        ConfigError: lists everything that does not fit.
    """
    model = params["model"]
    try:
        family: Family = family_of(root / model.folder)
    except (ConfigError, WeightsError) as error:
        problems = [f"model.folder: {error.problem}; found {error.found} (conf/model/)"]
    else:
        problems = [
            *_model(params),
            *_clip_skip(params, family),
            *_loras(params),
            *_export_settings(params),
            *_image(params),
            *_fleet(params, family),
            *_targets(params),
            *_graphs(params),
            *_quantize(params),
            *_tolerances(params),
            *_benchmark(params),
            *_generate(params),
            *_guidance(params),
            *_schedulers(params, family, root / model.folder),
            *_folders(params, root),
        ]
    if problems:
        raise ConfigError(
            f"{len(problems)} problem(s) in the configuration:\n  - " + "\n  - ".join(problems),
            fix="edit the files named, then compose again with `make params`",
        )


def _model(params: dict[str, Any]) -> Iterator[str]:
    model = params["model"]
    if model.source == "file" and PurePosixPath(model.checkpoint).suffix != ".safetensors":
        yield (
            "model.checkpoint: model.source=file needs the path of a .safetensors file with all "
            f"networks of a model; found {model.checkpoint} (conf/model/)"
        )
    if model.source != "hub":
        return
    if not model.repo:
        yield "model.repo: the hub needs one, such as CompVis/stable-diffusion-v1-4 (conf/model/)"
    if not _COMMIT.fullmatch(model.revision or ""):
        yield (
            "model.revision: expected the full hash of a commit, 40 hexadecimal digits, so that "
            "every machine downloads the same weights; found "
            f"{model.revision or 'none'} (conf/model/)"
        )


def _clip_skip(params: dict[str, Any], family: Family) -> Iterator[str]:
    if params["model"].clip_skip and not family.skips:
        yield (
            f"model.clip_skip: a {family.class_name} takes an earlier hidden state already; "
            f"expected 0, found {params['model'].clip_skip} (conf/model/)"
        )


def _loras(params: dict[str, Any]) -> Iterator[str]:
    model = params["model"]
    for index, lora in enumerate(model.loras):
        if lora.weight == 0:
            yield (
                f"model.loras.{index}.weight: 0 changes nothing; for a run without {lora.file}, "
                "leave it out of the list: `model.loras=[]` (conf/lora/)"
            )
    yield from _added_files("model.loras", [lora.file for lora in model.loras], model.lora_folder)
    files = [embedding.file for embedding in model.embeddings]
    yield from _added_files("model.embeddings", files, model.lora_folder)
    words = [embedding.word for embedding in model.embeddings]
    for word in sorted({word for word in words if words.count(word) > 1}):
        yield f"model.embeddings: two files for the word {word} (conf/lora/)"


def _added_files(key: str, files: Sequence[str], folder: str) -> Iterator[str]:
    seen = set()
    for index, file in enumerate(files):
        path = PurePosixPath(file)
        if path.suffix != ".safetensors":
            yield (
                f"{key}.{index}.file: only safetensors are read, pickles can run code when loaded; "
                f"found {file} (conf/lora/)"
            )
        if path.is_absolute() or ".." in path.parts:
            yield (
                f"{key}.{index}.file: expected a path below model.lora_folder ({folder}), which "
                f"DVC watches; found {file}: move the file there, or set model.lora_folder "
                "(conf/lora/)"
            )
        if path in seen:
            yield f"{key}.{index}.file: {path} is listed twice; once is enough (conf/lora/)"
        seen.add(path)


def _export_settings(params: dict[str, Any]) -> list[str]:
    export, problems = params["export"], []
    if unknown := [name for name in export.patches if name not in PATCHES]:
        problems.append(
            f"export.patches: no such patch: {', '.join(unknown)}; expected any of "
            f"{', '.join(sorted(PATCHES))} (conf/export/)"
        )
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


def _image(params: dict[str, Any]) -> Iterator[str]:
    factor = params["image"].vae_scale_factor
    for name in ("height", "width"):
        if (size := getattr(params["image"], name)) % factor:
            yield (
                f"image.{name}: expected a multiple of image.vae_scale_factor {factor}, found "
                f"{size} (conf/model/)"
            )


def _fleet(params: dict[str, Any], family: Family) -> Iterator[str]:
    """Each target has a choice, and what a choice names is there."""
    targets, fleet = params["targets"], params["fleet"]
    roles = dict.fromkeys(component.role for component in family.components.values())
    known = [*family.components, *roles]
    for name in targets:
        if name not in fleet:
            yield (
                f"fleet.{name}: missing, so nothing is built for targets.{name}; in the defaults "
                f"of the fleet: `- /precision@fleet.{name}: fp16` (conf/fleet/)"
            )
    for name, choice in fleet.items():
        if name not in targets:
            yield (
                f"fleet.{name}: no target {name}; there are {', '.join(sorted(targets))} "
                "(conf/fleet/)"
            )
        if choice.alternative_to is not None:
            yield from _alternative(name, choice.alternative_to, params)
        for what in choice.only or []:
            if what not in known:
                yield (
                    f"fleet.{name}.only: the model {params['model'].name} has no {what}; as a "
                    f"{family.class_name} it has {', '.join(known)} (conf/fleet/)"
                )
    built = {engine.target for engine in params["engines"].values()}
    for name in params["measure"]:
        if name not in built:
            yield f"measure: no engine is built for the target {name} (conf/fleet/)"


def _alternative(name: str, to: str, params: dict[str, Any]) -> Iterator[str]:
    """An alternative is to a target of the fleet, on hardware that may be the same."""
    targets, fleet = params["targets"], params["fleet"]
    key = f"fleet.{name}.alternative_to"
    if to == name or to not in targets or name not in targets:
        yield (
            f"{key}: expected another target of the fleet "
            f"({', '.join(sorted(set(targets) - {name}))}), found {to} (conf/fleet/)"
        )
        return
    if to in fleet and fleet[to].alternative_to is not None:
        yield (
            f"{key}: {to} is an alternative itself, to {fleet[to].alternative_to}; name that one "
            "(conf/fleet/)"
        )
    ours, theirs = (_hardware(targets[one]) for one in (name, to))
    if any(one != other for one, other in zip(ours, theirs, strict=True) if one and other):
        yield (
            f"{key}: alternatives are for the same hardware; {name} is for "
            f"{' '.join(filter(None, ours))}, {to} for {' '.join(filter(None, theirs))} "
            "(conf/target/)"
        )


def _hardware(target: Target) -> tuple[str, str | None]:
    """Return the device that a target's engines run on, and the GPU's name if it is for one."""
    return backend(target.backend).device(target), getattr(target, "gpu", None)


def _targets(params: dict[str, Any]) -> Iterator[str]:
    for name, target in params["targets"].items():
        precisions = {e.precision for e in params["engines"].values() if e.target == name}
        module = backend(target.backend)
        for problem in module.check(target, precisions):
            yield f"targets.{name}.{problem}"
        for precision in sorted(precisions - set(module.precisions)):
            yield (
                f"fleet.{name}: the backend {target.backend} has "
                f"{', '.join(module.precisions)}, not {precision} (conf/fleet/)"
            )


def _graphs(params: dict[str, Any]) -> Iterator[str]:
    opset = params["export"].opset
    for precision in _precisions(params["exports"].values()):
        if opset < (since := PRECISIONS[precision].opset):
            yield (
                f"export.opset: ONNX has {precision} convolutions from opset {since} on, found "
                f"{opset} (conf/export/)"
            )
        if precision not in params["simplify"].rel_l2:
            yield f"simplify.rel_l2.{precision}: missing (conf/simplify/)"


def _precisions(graphs: Collection[Any]) -> list[str]:
    return list(dict.fromkeys(graph.precision for graph in graphs))


def _quantize(params: dict[str, Any]) -> Iterator[str]:
    for precision in _precisions(params["quantized"].values()):
        settings = params["quantize"].settings(precision)
        if settings.source not in (sources := PRECISIONS[precision].sources):
            yield (
                f"quantize.{precision}.source: {precision} is made from {' or '.join(sources)}, "
                f"found {settings.source} (conf/quantize/)"
            )
        for component, patterns in settings.kept.items():
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    yield (
                        f"quantize.{precision}.kept.{component}: {pattern!r} is no regular "
                        f"expression: {error} (conf/quantize/)"
                    )


def _tolerances(params: dict[str, Any]) -> Iterator[str]:
    """Whatever is compared has a tolerance, before the work whose result it would judge."""
    validate = params["validate"]
    compared = {(g.component, g.precision) for g in params["exports"].values()}
    for measured in params["measured"].values():
        compared |= set(measured.components.items())
        for precision in set(measured.components.values()):
            for name in ("latents", "images"):
                if precision not in getattr(validate, name):
                    yield f"validate.{name}.{precision}: missing (conf/validate/)"
    for component, precision in sorted(compared):
        if precision not in validate.components.get(component, {}):
            yield (
                f"validate.components.{component}.{precision}: missing, expected rel_l2, max_abs "
                "and cosine (conf/validate/)"
            )


def _benchmark(params: dict[str, Any]) -> Iterator[str]:
    if ENGINES in params["benchmark"].baselines:
        yield (
            f"benchmark.baselines.{ENGINES}: the name is taken by what the baselines are beside; "
            "choose another (conf/benchmark/)"
        )


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


def _schedulers(params: dict[str, Any], family: Family, folder: Path) -> Iterator[str]:
    known = ", ".join(family.schedulers)
    try:
        config = read_json(folder / SCHEDULER_CONFIG)
    except IntegrityError as error:
        yield f"model.folder: {error.problem} (conf/model/)"
        return
    for section in ("reference", "benchmark", "generate"):
        name, steps = params[section].scheduler, params[section].steps
        if name not in family.schedulers:
            yield (
                f"{section}.scheduler: a {family.class_name} has {known}, found {name} "
                f"(conf/{section}/)"
            )
        elif problem := family.schedulers[name].problem(steps, config):
            yield f"{section}.steps: {name}: {problem}, found {steps} (conf/{section}/)"


def _folders(params: dict[str, Any], root: Path) -> Iterator[str]:
    """DVC would miss them in words that do not name the key."""
    model = params["model"]
    if model.source == "file" and not (root / model.checkpoint).is_file():
        yield f"model.checkpoint: no such file, found {model.checkpoint} (conf/model/)"
    for key, folder, group in (
        ("model.lora_folder", params["model"].lora_folder, "lora"),
        ("validate.scorers", params["validate"].scorers, "validate"),
    ):
        if not (root / folder).is_dir():
            yield (
                f"{key}: no such folder, found {folder}; an empty one will do: `mkdir -p "
                f"{shlex.quote(folder)}` (conf/{group}/)"
            )
