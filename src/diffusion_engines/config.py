"""The sections of params.yaml as typed, frozen dataclasses.

``conf/`` is composed into ``params.yaml``; a stage reads its sections from there through
:func:`sections_from_config`. Everything wrong with them is reported at once, by full key, with the
file to edit, before any work starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from diffusion_engines.backends.base import STRICT
from diffusion_engines.backends.targets import Target
from diffusion_engines.errors import ConfigError
from diffusion_engines.families import FAMILIES
from diffusion_engines.precisions import PRECISIONS


def _known_precision(name: str) -> str:
    if name not in PRECISIONS:
        raise PydanticCustomError("precision", "expected one of {known}", {"known": _KNOWN})
    return name


def _exported_precision(name: str) -> str:
    if not (name in PRECISIONS and PRECISIONS[name].exported):
        raise PydanticCustomError("precision", "expected one of {known}", {"known": _EXPORTED})
    return name


def _known_scheduler(name: str) -> str:
    if name not in SCHEDULERS:
        known = {"known": ", ".join(SCHEDULERS)}
        raise PydanticCustomError("scheduler", "expected one of {known}", known)
    return name


# The noise schedulers of all families, by name.
SCHEDULERS = tuple(
    dict.fromkeys(name for family in FAMILIES.values() for name in family.schedulers)
)
_KNOWN = ", ".join(PRECISIONS)
_EXPORTED = ", ".join(name for name, one in PRECISIONS.items() if one.exported)
# Of engines, and of graphs as an exporter writes them and as PyTorch runs.
PrecisionName = Annotated[str, AfterValidator(_known_precision)]
ExportedPrecision = Annotated[str, AfterValidator(_exported_precision)]
# Of any family; that the model's own has it is checked in checks.py.
SchedulerName = Annotated[str, AfterValidator(_known_scheduler)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
# Of one image; those after it in a batch have the next numbers, and PyTorch ends at 2^64.
Seed = Annotated[int, Field(ge=0, lt=2**63)]
GuidanceScale = Annotated[float, Field(ge=1.0, allow_inf_nan=False)]
PixelSize = Annotated[int, Field(gt=0, multiple_of=8)]
# How far something may be from the reference; NaN or infinity would let everything pass.
Tolerance = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Range = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]


@dataclass(config=STRICT)
class Lora:
    """A LoRA that is fused into the weights (conf/lora/)."""

    file: str  # safetensors, relative to model.lora_folder
    weight: Annotated[float, Field(allow_inf_nan=False)]


@dataclass(config=STRICT)
class Embedding:
    """A word of textual inversion that is added to the vocabulary (conf/lora/)."""

    file: str  # safetensors, relative to model.lora_folder
    word: Annotated[str, Field(pattern=r"^\S+$")]


@dataclass(config=STRICT)
class Model:
    """Where the weights come from (conf/model/)."""

    name: str
    source: Literal["hub", "local", "file", "synthetic"]
    # diffusers folder watched by DVC: the whole model for `local`, else its architecture JSONs
    folder: str
    # of `file`: safetensors with all networks, watched by DVC, which needs a path: else the folder
    checkpoint: str
    repo: str | None
    revision: str | None
    seed: Seed  # of synthetic weights
    dtype: Literal["fp32", "fp16"]  # in which synthetic weights are stored
    # layers at the end of the text encoder that are left out, as of diffusers' argument
    clip_skip: NonNegativeInt
    parameters: dict[str, PositiveInt]  # per folder, of the whole model; checked after the download
    lora_folder: str  # watched by DVC
    loras: list[Lora]
    embeddings: list[Embedding]


@dataclass(config=STRICT)
class Image:
    """Size of the generated images, in pixels, and how many a call makes (conf/model/)."""

    height: PixelSize
    width: PixelSize
    batch_size: PositiveInt
    vae_scale_factor: PositiveInt  # pixels per latent, along an edge
    # Whether the denoiser gets both halves of classifier-free guidance; few-step models need one.
    guidance: bool = True


@dataclass(config=STRICT)
class Reference:
    """The denoising runs that engines are compared on (conf/reference/)."""

    prompts: Annotated[list[str], Field(min_length=1)]
    negative_prompt: str
    scheduler: SchedulerName
    steps: PositiveInt
    guidance_scale: GuidanceScale
    seed: Seed
    frames: PositiveInt  # intermediate images of the first prompt, for the animation


@dataclass(config=STRICT)
class Dynamic:
    """Ranges `[min, max]` of the dimensions that an exported graph leaves open; null: fixed."""

    batch_size: Range | None
    height: Range | None
    width: Range | None


@dataclass(config=STRICT)
class Export:
    """How components become ONNX graphs (conf/export/)."""

    exporter: Literal["dynamo", "torchscript"]
    opset: PositiveInt
    patches: list[str]
    dynamic: Dynamic


@dataclass(config=STRICT)
class Simplify:
    """onnxsim, and how much its result may differ numerically (conf/simplify/)."""

    skipped_optimizers: list[str]
    # relative L2 error between the graph before and after, by precision
    rel_l2: dict[ExportedPrecision, Tolerance]
    # recorded calls that the graph is compared with PyTorch at, spread over all; null: every one
    calls: PositiveInt | None


@dataclass(config=STRICT)
class EightBit:
    """Post-training quantization to INT8 or FP8 (conf/quantize/)."""

    source: ExportedPrecision  # of the graph that it is made from, and of its inputs and outputs
    # recorded calls to calibrate on, spread over all timesteps and prompts; null: every one
    calls: PositiveInt | None
    method: Literal["max", "entropy"]  # how the range of an activation follows from its values
    # layers that keep the source's precision: regular expressions on the names of their weights
    kept: dict[str, list[str]]
    rel_l2: Tolerance  # that it may cost at any call, against the fp32 reference


@dataclass(config=STRICT)
class Mixed:
    """fp16, but for the operators whose values leave its range (conf/quantize/)."""

    source: ExportedPrecision  # as for 8 bits
    calls: PositiveInt | None  # as for 8 bits: where the largest values are looked for
    largest: Annotated[
        float, Field(gt=0, allow_inf_nan=False)
    ]  # absolute value that an operator in fp16 may see
    kept: dict[str, list[str]]  # layers that stay in fp32 in any case
    rel_l2: Tolerance


@dataclass(config=STRICT)
class Quantize:
    """How simplified graphs get a lower precision (conf/quantize/)."""

    int8: EightBit
    fp8: EightBit
    mixed: Annotated[Mixed, Field(alias="fp16-mixed")]

    def settings(self, precision: str) -> EightBit | Mixed:
        """Return the settings of one precision."""
        known: dict[str, EightBit | Mixed] = {
            "int8": self.int8,
            "fp8": self.fp8,
            "fp16-mixed": self.mixed,
        }
        return known[precision]


@dataclass(config=STRICT)
class Choice:
    """What a fleet builds for a target (conf/fleet/)."""

    precision: PrecisionName
    only: list[str] | None  # components or roles; null: every component of the model
    components: dict[str, PrecisionName | None]  # exceptions, by component or role
    # a target of the fleet for the same hardware, in whose place the faster engines are loaded
    alternative_to: str | None


@dataclass(config=STRICT)
class Graph:
    """One component in one precision as ONNX; derived from the fleet (tables.py)."""

    component: str
    weights: str  # the folder of artifacts/weights/ that it reads
    precision: PrecisionName
    source: str | None  # the graph that the stage quantize makes it from; null: it is exported


@dataclass(config=STRICT)
class Program:
    """One component as an exported program for one target; derived from the fleet (tables.py)."""

    target: str
    component: str
    weights: str  # the folder of artifacts/weights/ whose config.json it reads
    precision: PrecisionName


@dataclass(config=STRICT)
class Engine:
    """One component built for one target; derived from the fleet (tables.py).

    The rest are paths that its stages depend on, for dvc.yaml: of the graph, of the code that
    builds and wraps it, of code that several backends share, and of the weights that are added.
    """

    target: str
    backend: str
    component: str
    precision: PrecisionName
    graph: str
    graph_folder: str
    code: str
    shared: str
    wrap_code: str
    wrap_weights: str


@dataclass(config=STRICT)
class Measured:
    """A target that is validated and timed; derived from `measure` (tables.py).

    The rest is of an alternative, which is timed in one run with what it is an alternative to: the
    components of that one, and for dvc.yaml a path, of its bundles.
    """

    components: dict[str, PrecisionName]  # those that have an engine
    alternative_to: str | None
    beside: dict[str, PrecisionName]
    beside_folder: str


@dataclass(config=STRICT)
class Alternatives:
    """Measured targets for the hardware of another one; derived from the fleet (tables.py)."""

    targets: list[str]


@dataclass(config=STRICT)
class Timing:
    """A target whose timing caches are kept between builds; derived from the fleet (tables.py)."""

    components: list[str]


@dataclass(config=STRICT)
class Gate:
    """What a component's output may differ from the fp32 reference, at any timestep."""

    rel_l2: Tolerance
    max_abs: Tolerance
    cosine: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


@dataclass(config=STRICT)
class LatentsGate:
    """What the latents of a whole run may differ from the fp32 reference's, after any step."""

    rel_l2: Tolerance
    cosine: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


@dataclass(config=STRICT)
class ImageGate:
    """What a final image must reach beside the reference image: PSNR in dB, SSIM up to 1."""

    psnr: Annotated[float, Field(allow_inf_nan=False)]
    ssim: Annotated[float, Field(le=1, allow_inf_nan=False)]


@dataclass(config=STRICT)
class Validate:
    """Tolerances by component and precision (conf/validate/)."""

    components: dict[str, dict[PrecisionName, Gate]]
    latents: dict[PrecisionName, LatentsGate]
    images: dict[PrecisionName, ImageGate]
    scorers: str  # a folder with pretrained networks that score images; parity/scorers.py


# What is timed beside the baselines.
ENGINES = "engines"


@dataclass(config=STRICT)
class Baseline:
    """PyTorch, run as somebody would who has no engines."""

    precision: ExportedPrecision
    autocast: bool  # to fp16, as the article runs it; CUDA only
    compile: Literal["default", "reduce-overhead", "max-autotune"] | None  # mode of torch.compile
    channels_last: bool

    @property
    def label(self) -> str:
        """What it is, in words."""
        parts = ["torch.compile", self.compile] if self.compile else ["PyTorch eager"]
        parts += [self.precision]
        parts += ["autocast"] if self.autocast else []
        parts += ["channels last"] if self.channels_last else []
        return ", ".join(parts)


@dataclass(config=STRICT)
class Benchmark:
    """The timed runs (conf/benchmark/)."""

    prompt: str
    scheduler: SchedulerName
    steps: PositiveInt
    guidance_scale: GuidanceScale
    seed: Seed
    warmup: NonNegativeInt
    repeats: PositiveInt
    # what engines are timed beside, by name; speedups are over the first
    baselines: Annotated[dict[str, Baseline], Field(min_length=1)]


@dataclass(config=STRICT)
class Generate:
    """The images that engines make of prompts (conf/generate/)."""

    prompts: Annotated[list[str], Field(min_length=1)]
    images_per_prompt: PositiveInt
    negative_prompt: str
    scheduler: SchedulerName
    steps: PositiveInt
    guidance_scale: GuidanceScale
    seed: Seed  # of the first image; the next one has the next number
    height: PixelSize | None  # null: those of the section image
    width: PixelSize | None
    frames: NonNegativeInt  # of the animation of each image
    folder: str | None  # null: artifacts/images/<target>, where DVC expects them


@dataclass(config=STRICT)
class Price:
    """What hardware costs (conf/prices/): of one GPU, or of a machine without one."""

    per_hour: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")]  # ISO 4217
    source: Annotated[str, Field(min_length=1)]  # where the price stands
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]  # when it stood there


SECTIONS: dict[str, Any] = {
    "conf_digest": str,
    "model": Model,
    "image": Image,
    "reference": Reference,
    "export": Export,
    "simplify": Simplify,
    "quantize": Quantize,
    "validate": Validate,
    "benchmark": Benchmark,
    "generate": Generate,
    "prices": dict[str, Price],
    "targets": dict[str, Target],
    "fleet": dict[str, Choice],
    "measure": list[str],
    "graphs": dict[str, Graph],
    "exports": dict[str, Graph],
    "quantized": dict[str, Graph],
    "programs": dict[str, Program],
    "engines": dict[str, Engine],
    "measured": dict[str, Measured],
    "alternatives": dict[str, Alternatives],
    "timing": dict[str, Timing],
}

# What follows from the others (tables.py), and is wrong only where they are or somebody edited it.
DERIVED = (
    "graphs",
    "exports",
    "quantized",
    "programs",
    "engines",
    "measured",
    "alternatives",
    "timing",
)

# Folders of conf/ that no composition reads.
LAUNCHER = "launcher"
NOT_COMPOSED = ("sweep", "pick", LAUNCHER)

# Where the keys of a section are written; those of a fleet and its targets carry names.
_SECTION_FOLDERS = {
    "image": "model",
    "measure": "fleet",
    "targets": "target",
    **dict.fromkeys(DERIVED, "fleet"),
}


def sections_from_config(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the named sections of a composed config as typed values.

    Raises:
        ConfigError: lists every unknown key, wrong type and missing value of these sections.
    """
    return values_from_config(config, {name: (name, SECTIONS[name]) for name in names})


def values_from_config(
    config: Mapping[str, Any], wanted: Mapping[str, tuple[str, Any]]
) -> dict[str, Any]:
    """Return parts of a composed config as typed values.

    Args:
        config: sections by name, as plain data.
        wanted: for each name of the result, the full key and the type of its value.

    Raises:
        ConfigError: lists every unknown key, wrong type and missing value of these parts.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, (key, kind) in wanted.items():
        section, *path = key.split(".")
        value: Any = config
        for part in (section, *path):
            value = value.get(part, _MISSING) if isinstance(value, Mapping) else _MISSING
        if value is _MISSING:
            problems.append(f"{key}: missing (write it in {_conf_file(section, path)})")
            continue
        try:
            # As JSON: strict, yet it lets mappings be dataclasses.
            text = json.dumps(value, default=str)
            values[name] = TypeAdapter(kind).validate_json(text)
        except ValidationError as error:
            problems.extend(
                _describe(section, path, detail) for detail in error.errors(include_url=False)
            )
        except (TypeError, RecursionError) as error:  # of json: a key of bytes
            problems.append(f"{key}: {error} ({_conf_file(section, path)})")
    if problems:
        raise ConfigError(
            f"{len(problems)} problem(s) in the configuration:\n  - " + "\n  - ".join(problems),
            fix="edit the files named, then compose again with `make params`;\n"
            "or correct the override on the command line",
        )
    return values


_MISSING = object()


def params_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return all sections, typed, and check that no other one is there.

    Raises:
        ConfigError: as :func:`sections_from_config`, or a section is unknown.
    """
    unknown = sorted(str(name) for name in set(config) - set(SECTIONS))
    if unknown:
        raise ConfigError(
            f"unknown section(s) in params.yaml: {', '.join(unknown)}",
            expected=", ".join(sorted(SECTIONS)),
            found=", ".join(unknown),
            fix="remove them from conf/, then compose again with `make params`",
        )
    written = sections_from_config(config, [name for name in SECTIONS if name not in DERIVED])
    return written | sections_from_config(config, DERIVED)


def _describe(section: str, path: list[Any], detail: Any) -> str:
    path = [*path, *detail["loc"]]
    key = ".".join(str(part) for part in (section, *path))
    message = detail["msg"][0].lower() + detail["msg"][1:]
    if detail["type"] == "unexpected_keyword_argument":
        message = "unknown key"
    elif detail["type"] in ("missing", "missing_argument"):
        message = "missing"
    else:
        message += f", found {detail['input']!r}"
    return f"{key}: {message} ({_conf_file(section, path)})"


def _conf_file(section: str, path: list[Any] | None = None) -> str:
    if section == "targets" and path:
        if len(path) > 1 and path[1] == "build":
            return "conf/build/"
        return f"conf/target/{path[0]}.yaml"
    if section == "model" and path and path[0] in ("lora_folder", "loras", "embeddings"):
        return "conf/lora/"
    return f"conf/{_SECTION_FOLDERS.get(section, section)}/"


def conf_digest(conf: Path) -> str:
    """Return a short digest of every YAML file that is composed, names and contents.

    Sweeps, rules to pick by and launchers (:data:`NOT_COMPOSED`) are not: none is in params.yaml.
    """
    digest = hashlib.sha256()
    for path in sorted(conf.rglob("*.yaml")):
        name = path.relative_to(conf)
        if name.parts[0] not in NOT_COMPOSED:
            digest.update(name.as_posix().encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
