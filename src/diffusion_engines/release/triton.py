"""A release as a model repository of NVIDIA's Triton Inference Server.

Each component is a model: of all TensorRT plans one, from which Triton takes the plan of its GPU's
compute capability, and of ONNX Runtime one per device. A model's version folder has files that
Triton reads and, of ONNX Runtime, the whole bundle with its manifest, so that
:func:`diffusion_engines.load_component` reads it, too. What lies between the networks (tokenizer,
scheduler, guidance) is the client's.

Layout: https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_repository.html
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_engines import manifests
from diffusion_engines.errors import IntegrityError
from diffusion_engines.families.base import TensorSpec
from diffusion_engines.files import copy_files, new_folder
from diffusion_engines.manifests import Bundle
from diffusion_engines.precisions import PRECISIONS
from diffusion_engines.release.profiles import Profile, check_profile, read_release

CONFIG = "config.pbtxt"
_VERSION = "1"
_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
}
# Of ONNX's TensorProto, by number.
_ONNX_TYPES = {1: "TYPE_FP32", 7: "TYPE_INT64", 10: "TYPE_FP16", 16: "TYPE_BF16"}


@dataclass(frozen=True)
class Tensor:
    """An input or output: its name, Triton's data type, and its sizes, -1 where one is open."""

    name: str
    kind: str
    dims: tuple[int, ...]


@dataclass
class Model:
    """A model of the repository.

    Attributes:
        backend: Triton's.
        gpu: whether it runs on one.
        inputs: of every file.
        outputs: likewise; None: Triton reads them from the plan.
        files: of the version folder, by the file of the release that each is.
        capabilities: the file for each compute capability; of plans.
        default: the file of all else; None: there is none, so that no GPU gets a foreign plan.
        made_from: SHA-256 of the manifest of each profile's bundle, by the profile's name.
    """

    backend: str
    gpu: bool
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...] | None
    default: str | None
    files: dict[str, Path] = field(default_factory=dict)
    capabilities: dict[str, str] = field(default_factory=dict)
    made_from: dict[str, str] = field(default_factory=dict)


def export_triton(release: Path, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Write a release as a model repository.

    Args:
        release: its folder.
        folder: of the model repository, which takes the place of an earlier one.

    Returns:
        The names of the models, and why what is not in it is not, by the profile's name.

    Raises:
        IntegrityError: the release is altered, or nothing of it is for Triton.
    """
    models: dict[str, Model] = {}
    refused: dict[str, str] = {}
    for profile in sorted(read_release(release).profiles, key=_speed):
        check_profile(profile, release)
        try:
            for name, model in _models(profile, release):
                _merge(models, name, model, profile.target)
        except _NotForTritonError as reason:
            refused[profile.target] = str(reason)
    if not models:
        raise IntegrityError(
            f"nothing of {release} is for Triton",
            expected="engines of ONNX Runtime, or plans of TensorRT",
            found="\n".join(f"{name}: {why}" for name, why in refused.items()),
        )
    with new_folder(folder) as repository:
        for name, model in models.items():
            version = repository / name / _VERSION
            for file, source in model.files.items():
                if source.is_dir():
                    copy_files(source, version, skip=())
                else:
                    _copy_file(source, version / file)
            (repository / name / CONFIG).write_text(config_text(name, model))
    return [*models], refused


class _NotForTritonError(Exception):
    """Why a profile is left out."""


def _speed(profile: Profile) -> tuple[float, str]:
    return profile.timing.picture_ms if profile.timing else math.inf, profile.target


def _models(profile: Profile, release: Path) -> Iterator[tuple[str, Model]]:
    makers = {"tensorrt": _of_plan, "onnxruntime": _of_onnx}
    if profile.backend not in makers:
        raise _NotForTritonError(f"Triton has no backend that runs engines of {profile.backend}")
    for component in profile.precisions:
        bundle = release / profile.target / component
        manifest = manifests.read(bundle, Bundle)
        name, model = makers[profile.backend](component, profile, bundle, manifest)
        model.made_from[profile.target] = profile.manifests[component]
        yield name, model


def _of_plan(component: str, profile: Profile, bundle: Path, manifest: Bundle) -> tuple[str, Model]:
    capability = str(manifest.fingerprint["compute_capability"])
    if manifest.settings["build"]["weights"] == "stripped":
        raise _NotForTritonError("its plans have no weights, which Triton cannot add")
    file = f"{profile.target}.plan"
    inputs = tuple(_tensor(spec, manifest.precision) for spec in manifest.inputs)
    model = Model("tensorrt", True, inputs, None, None)
    model.files[file] = bundle / manifest.engine
    model.capabilities[capability] = file
    return f"{component}-tensorrt", model


def _of_onnx(component: str, profile: Profile, bundle: Path, manifest: Bundle) -> tuple[str, Model]:
    import onnx

    graph = onnx.load(bundle / manifest.engine, load_external_data=False).graph
    model = Model(
        "onnxruntime",
        profile.device != "cpu",
        tuple(map(_tensor_of_onnx, graph.input)),
        tuple(map(_tensor_of_onnx, graph.output)),
        manifest.engine,
    )
    model.files[manifest.engine] = bundle
    return f"{component}-onnxruntime-{profile.device}", model


def _tensor(spec: TensorSpec, precision: str) -> Tensor:
    kind = PRECISIONS[precision].torch_dtype if spec.dtype == "component" else spec.dtype
    if kind is None:
        raise _NotForTritonError(f"its manifest does not say which dtype {spec.name} has")
    dims = tuple(dim if isinstance(dim, int) else -1 for dim in spec.shape)
    return Tensor(spec.name, _TYPES[kind], dims)


def _tensor_of_onnx(value: Any) -> Tensor:
    kind = value.type.tensor_type
    dims = tuple(dim.dim_value or -1 for dim in kind.shape.dim)
    return Tensor(value.name, _ONNX_TYPES[kind.elem_type], dims)


def _merge(models: dict[str, Model], name: str, model: Model, target: str) -> None:
    """Add a profile's plan to the model of its component; anything else stands for itself."""
    if (there := models.setdefault(name, model)) is model:
        return
    others = ", ".join(there.made_from)
    if there.inputs != model.inputs:
        raise _NotForTritonError(f"its {name} takes other tensors than that of {others}")
    if not model.capabilities or there.capabilities.keys() & model.capabilities:
        of = f" for compute capability {', '.join(model.capabilities)}" if model.gpu else ""
        raise _NotForTritonError(f"a faster {name}{of} is there, of {others}")
    there.files |= model.files
    there.capabilities |= model.capabilities
    there.made_from |= model.made_from


def config_text(name: str, model: Model) -> str:
    """Return a model's ``config.pbtxt``, of the message ``inference.ModelConfig``.

    Batches are a part of each tensor's shape, as with guidance a picture has two rows:
    ``max_batch_size`` is 0.
    """
    lines = [f"name: {_quoted(name)}", f"backend: {_quoted(model.backend)}", "max_batch_size: 0"]
    lines += _tensors("input", model.inputs)
    lines += _tensors("output", model.outputs or ())
    if model.default is not None:
        lines.append(f"default_model_filename: {_quoted(model.default)}")
    for capability, file in sorted(model.capabilities.items()):
        lines.append(f"cc_model_filenames {{ key: {_quoted(capability)} value: {_quoted(file)} }}")
    lines.append(f"instance_group {{ kind: {'KIND_GPU' if model.gpu else 'KIND_CPU'} }}")
    for target, digest in sorted(model.made_from.items()):
        key = _quoted(f"manifest_sha256.{target}")
        lines.append(f"parameters {{ key: {key} value {{ string_value: {_quoted(digest)} }} }}")
    return "\n".join(lines) + "\n"


def _tensors(field_name: str, tensors: Sequence[Tensor]) -> list[str]:
    return [
        f"{field_name} {{ name: {_quoted(one.name)} data_type: {one.kind} "
        f"dims: [{', '.join(map(str, one.dims))}] }}"
        for one in tensors
    ]


def _quoted(text: str) -> str:
    # Names of targets and components are checked to be plain (tables.py), file names are ours.
    assert not set(text) & set('"\\\n'), text
    return f'"{text}"'


def _copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
