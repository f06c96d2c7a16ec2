"""The sections of params.yaml as typed, frozen dataclasses.

``conf/`` is composed into ``params.yaml``; a stage reads its sections from there through
:func:`sections_from_config`. Everything wrong with them is reported at once, by full key, with the
file to edit, before any work starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from diffusion_engines.backends.targets import Target
from diffusion_engines.errors import ConfigError

_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)

# What the exporter writes, what `quantize` makes of it, and what an engine can therefore have.
Precision = Literal["fp32", "fp16", "bf16"]
QuantizedPrecision = Literal["int8", "fp8", "fp16-mixed"]
EnginePrecision = Precision | QuantizedPrecision
Component = Literal["text_encoder", "text_encoder_2", "unet", "vae_decoder"]
SchedulerName = Literal["lms", "pndm", "euler", "dpmpp_2m", "ddim", "euler_ancestral", "lcm"]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PixelSize = Annotated[int, Field(gt=0, multiple_of=8)]
# How far something may be from the reference; NaN or infinity would let everything pass.
Tolerance = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Range = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]


@dataclass(config=_STRICT)
class Lora:
    """A LoRA that is fused into the weights (conf/lora/)."""

    file: str  # safetensors, relative to model.lora_folder
    weight: Annotated[float, Field(allow_inf_nan=False)]


@dataclass(config=_STRICT)
class Model:
    """Where the weights come from (conf/model/)."""

    name: str
    source: Literal["hub", "local", "synthetic"]
    # diffusers folder watched by DVC: the whole model for `local`, else its architecture JSONs
    folder: str
    repo: str | None
    revision: str | None
    seed: int  # of synthetic weights
    dtype: Literal["fp32", "fp16"]  # in which synthetic weights are stored
    parameters: dict[str, PositiveInt]  # per folder; checked after the download
    lora_folder: str  # watched by DVC
    loras: list[Lora]


@dataclass(config=_STRICT)
class Image:
    """Size of the generated images, in pixels, and how many a call makes (conf/model/)."""

    height: PixelSize
    width: PixelSize
    batch_size: PositiveInt
    vae_scale_factor: PositiveInt  # pixels per latent, along an edge
    # Whether the UNet gets both halves of classifier-free guidance; few-step models need one.
    guidance: bool = True


@dataclass(config=_STRICT)
class Reference:
    """The denoising runs that engines are compared on (conf/reference/)."""

    prompts: Annotated[list[str], Field(min_length=1)]
    negative_prompt: str
    scheduler: SchedulerName
    steps: PositiveInt
    guidance_scale: Annotated[float, Field(ge=1.0)]
    seed: int
    frames: PositiveInt  # intermediate images of the first prompt, for the animation


@dataclass(config=_STRICT)
class Dynamic:
    """Ranges `[min, max]` of the dimensions that an exported graph leaves open; null: fixed."""

    batch_size: Range | None
    height: Range | None
    width: Range | None


@dataclass(config=_STRICT)
class Export:
    """How components become ONNX graphs (conf/export/)."""

    exporter: Literal["dynamo", "torchscript"]
    opset: PositiveInt
    patches: list[str]
    dynamic: Dynamic


@dataclass(config=_STRICT)
class Simplify:
    """onnxsim, and how much its result may differ numerically (conf/simplify/)."""

    skipped_optimizers: list[str]
    # relative L2 error between the graph before and after, by precision
    rel_l2: dict[Precision, Tolerance]
    seed: int


@dataclass(config=_STRICT)
class EightBit:
    """Post-training quantization to INT8 or FP8 (conf/quantize/)."""

    # recorded calls to calibrate on, spread over all timesteps and prompts; null: every one
    calls: PositiveInt | None
    method: Literal["max", "entropy"]  # how the range of an activation follows from its values
    # layers that keep the source's precision: regular expressions on the names of their weights
    kept: dict[Component, list[str]]
    rel_l2: Tolerance  # that it may cost at any call, against the fp32 reference


@dataclass(config=_STRICT)
class Mixed:
    """fp16, but for the operators whose values leave its range (conf/quantize/)."""

    calls: PositiveInt | None  # as for 8 bits: where the largest values are looked for
    largest: Annotated[
        float, Field(gt=0, allow_inf_nan=False)
    ]  # absolute value that an operator in fp16 may see
    kept: dict[Component, list[str]]  # layers that stay in fp32 in any case
    rel_l2: Tolerance


@dataclass(config=_STRICT)
class Quantize:
    """How simplified graphs get a lower precision (conf/quantize/)."""

    int8: EightBit
    fp8: EightBit
    mixed: Annotated[Mixed, Field(alias="fp16-mixed")]

    def settings(self, precision: QuantizedPrecision) -> EightBit | Mixed:
        """Return the settings of one precision."""
        known: dict[str, EightBit | Mixed] = {
            "int8": self.int8,
            "fp8": self.fp8,
            "fp16-mixed": self.mixed,
        }
        return known[precision]


@dataclass(config=_STRICT)
class ExportItem:
    """One component in one precision (conf/fleet/)."""

    component: Component
    weights: str  # the folder of artifacts/weights/ that it reads
    precision: Precision


@dataclass(config=_STRICT)
class QuantizedItem:
    """One export, in a lower precision than the exporter has (conf/fleet/)."""

    component: Component
    precision: QuantizedPrecision
    source: Precision  # of the export that it is made from, and of its inputs and outputs

    @property
    def onnx(self) -> str:
        """The export that it is made from."""
        return f"{self.component}-{self.source}"


@dataclass(config=_STRICT)
class Engine:
    """One component built for one target (conf/fleet/)."""

    target: str
    backend: str  # that of the target, so that dvc.yaml can name the one module it depends on
    component: Component
    precision: EnginePrecision

    @property
    def onnx(self) -> str:
        """The export, or quantized export, that this engine is built from."""
        return f"{self.component}-{self.precision}"


@dataclass(config=_STRICT)
class Gate:
    """What a component's output may differ from the fp32 reference, at any timestep."""

    rel_l2: Tolerance
    max_abs: Tolerance
    cosine: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


@dataclass(config=_STRICT)
class LatentsGate:
    """What the latents of a whole run may differ from the fp32 reference's, after any step."""

    rel_l2: Tolerance
    cosine: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


@dataclass(config=_STRICT)
class ImageGate:
    """What a final image must reach beside the reference image: PSNR in dB, SSIM up to 1."""

    psnr: Annotated[float, Field(allow_inf_nan=False)]
    ssim: Annotated[float, Field(le=1, allow_inf_nan=False)]


@dataclass(config=_STRICT)
class Validate:
    """Tolerances by component and precision (conf/validate/)."""

    components: dict[Component, dict[EnginePrecision, Gate]]
    latents: dict[EnginePrecision, LatentsGate]
    images: dict[EnginePrecision, ImageGate]
    scorers: str  # a folder with pretrained networks that score images; parity/scorers.py


@dataclass(config=_STRICT)
class Baseline:
    """PyTorch, run as somebody would who has no engines."""

    precision: Precision
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


@dataclass(config=_STRICT)
class Benchmark:
    """The timed runs (conf/benchmark/)."""

    prompt: str
    scheduler: SchedulerName
    steps: PositiveInt
    guidance_scale: Annotated[float, Field(ge=1.0)]
    seed: int
    warmup: NonNegativeInt
    repeats: PositiveInt
    # what engines are timed beside, by name; speedups are over the first
    baselines: Annotated[dict[str, Baseline], Field(min_length=1)]


@dataclass(config=_STRICT)
class Generate:
    """The images that engines make of prompts (conf/generate/)."""

    prompts: Annotated[list[str], Field(min_length=1)]
    images_per_prompt: PositiveInt
    negative_prompt: str
    scheduler: SchedulerName
    steps: PositiveInt
    guidance_scale: Annotated[float, Field(ge=1.0)]
    seed: NonNegativeInt  # of the first image; the next one has the next number
    height: PixelSize | None  # null: those of the section image
    width: PixelSize | None
    frames: NonNegativeInt  # of the animation of each image
    folder: str | None  # null: artifacts/images/<target>, where DVC expects them


@dataclass(config=_STRICT)
class Measure:
    """A target that is validated and benchmarked on this machine (conf/fleet/)."""


@dataclass(config=_STRICT)
class Timing:
    """A target whose timing caches are kept between builds (conf/fleet/)."""


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
    "exports": dict[str, ExportItem],
    "quantized": dict[str, QuantizedItem],
    "targets": dict[str, Target],
    "engines": dict[str, Engine],
    "measure": dict[str, Measure],
    "timing": dict[str, Timing],
}

# Where the keys of a section are written; those of a fleet and its targets carry names.
_SECTION_FOLDERS = {
    "image": "model",
    "exports": "fleet",
    "quantized": "fleet",
    "engines": "fleet",
    "measure": "fleet",
    "timing": "fleet",
    "targets": "target",
}


def sections_from_config(config: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Return the named sections of a composed config as typed values.

    Raises:
        ConfigError: lists every unknown key, wrong type and missing value of these sections.
    """
    sections: dict[str, Any] = {}
    problems: list[str] = []
    for name in names:
        if name not in config:
            problems.append(f"{name}: missing (write it in {_conf_file(name)})")
            continue
        try:
            # As JSON: strict, yet it lets mappings be dataclasses.
            text = json.dumps(config[name], default=str)
            sections[name] = TypeAdapter(SECTIONS[name]).validate_json(text)
        except ValidationError as error:
            problems.extend(_describe(name, detail) for detail in error.errors(include_url=False))
    if problems:
        raise ConfigError(
            f"{len(problems)} problem(s) in the configuration:\n  - " + "\n  - ".join(problems),
            fix="edit the files named, then compose again with `make params`;\n"
            "or correct the override on the command line",
        )
    return sections


def params_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return all sections, typed, and check that no other one is there.

    Raises:
        ConfigError: as :func:`sections_from_config`, or a section is unknown.
    """
    unknown = sorted(set(config) - set(SECTIONS))
    if unknown:
        raise ConfigError(
            f"unknown section(s) in params.yaml: {', '.join(unknown)}",
            expected=", ".join(sorted(SECTIONS)),
            found=", ".join(unknown),
            fix="remove them from conf/, then compose again with `make params`",
        )
    return sections_from_config(config, list(SECTIONS))


def _describe(section: str, detail: Any) -> str:
    path = list(detail["loc"])
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
    if section == "model" and path and path[0] in ("lora_folder", "loras"):
        return "conf/lora/"
    return f"conf/{_SECTION_FOLDERS.get(section, section)}/"


def conf_digest(conf: Path) -> str:
    """Return a short digest of every YAML file below ``conf``, names and contents."""
    digest = hashlib.sha256()
    for path in sorted(conf.rglob("*.yaml")):
        digest.update(path.relative_to(conf).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
