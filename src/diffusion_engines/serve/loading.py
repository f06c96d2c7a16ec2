"""Load engines as PyTorch modules, or all of a target as a diffusers pipeline.

Heavy libraries are imported inside the functions: ``import diffusion_engines`` stays instant.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_engines import manifests
from diffusion_engines.backends.targets import device_of_engine
from diffusion_engines.errors import (
    ConfigError,
    DiffusionEnginesError,
    HardwareError,
    IntegrityError,
)
from diffusion_engines.families import family_of
from diffusion_engines.families.base import SCHEDULER_CONFIG
from diffusion_engines.families.noise_schedules import scheduler_class
from diffusion_engines.files import MANIFEST, read_json
from diffusion_engines.manifests import Bundle, Engine, FusedLora, Graph, Pipeline, Weights
from diffusion_engines.release.choosing import Fallback, choose, choose_alternatives, profile_of
from diffusion_engines.release.profiles import RELEASE
from diffusion_engines.runtime.bundle import is_device, load_bundle
from diffusion_engines.serve.pack import PIPELINE
from diffusion_engines.serve.signing import check_signature

if TYPE_CHECKING:
    from diffusion_engines.families.base import Family, Model
    from diffusion_engines.runtime.shapes import CheckedEngine


def load_component(
    folder: str | PathLike[str], device: str | None = None, *, threads: int | None = None
) -> CheckedEngine:
    """Return one engine as a ``torch.nn.Module``.

    Its inputs and outputs are those that its family declares (``families/``); inputs are cast to
    the dtypes that the engine takes, and moved where it runs.

    Args:
        folder: a bundle, e.g. ``artifacts/bundles/cpu/unet``.
        device: where to run, ``cpu`` or ``cuda``; None: what the engine was built for. To choose
            among several GPUs, set CUDA_VISIBLE_DEVICES.
        threads: of the CPU for each call; set for all that PyTorch does in this process, too. None:
            one for each core that the process may use, by its affinity and its control groups'
            quota, and PyTorch's stay as they are.

    Raises:
        IntegrityError: a file is missing or altered.
        FingerprintError: the engine was built for another machine or library version.
        HardwareError: the engine does not run on ``device``, or the backend's library or GPU is
            missing here; of the module, when called in a process that was forked from this one.
        ConfigError: there cannot be so many threads.
        ShapeError: of the module, when called with a size that the engine was not built for.
    """
    folder = Path(folder)
    manifest = manifests.read(folder, Bundle, verify=False)  # load_bundle checks the files
    return load_bundle(folder, _device(manifest, device), threads=threads)


def load_pipeline(
    folder: str | PathLike[str],
    device: str | None = None,
    *,
    target: str | None = None,
    threads: int | None = None,
    fallback: Fallback = "error",
    weights: str | PathLike[str] | None = None,
    public_key: str | PathLike[str] | None = None,
) -> Any:
    """Return a diffusers pipeline whose networks are engines.

    It is of the model's own class, whose call runs the denoising loop on the device where nothing
    looks into it: no callback, no ``timesteps``, and a scheduler whose steps are sums, as most are.
    Scheduler and tokenizers are the model's, too; a pipeline's
    usual attributes can be replaced, as in
    ``pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)``. Between the
    networks everything is fp32; each engine casts to the precision that it computes in. Sizes
    default to those that the engines were built around.

    Args:
        folder: all bundles of a target, e.g. ``artifacts/bundles/cpu``; nothing else is read. Or a
            release (``make publish``), of which the profile that suits this machine is taken. Or
            ``artifacts``: of the targets for this machine's hardware, the engines that the stage
            `choose` found the fastest, component by component.
        target: whose engines to take of a release or of ``artifacts``; None: as said there.
        device: as of :func:`load_component`.
        fallback: of a release whose engines for this machine can no longer be loaded; as of
            :func:`diffusion_engines.release.choosing.choose`.
        weights: the diffusers folder that ``fallback="pytorch"`` loads, such as
            ``artifacts/weights``; its hashes must be those that the release was made from.
        threads: as of :func:`load_component`.
        public_key: whose signature of the folder must be in it, as ``model.sig``; None: of nobody.

    Raises:
        IntegrityError: a file or an engine is missing or altered, or engines of different models
            or weights are mixed; with a key, anything is not as it was signed.
        ConfigError: the model is of a pipeline that cannot be made of engines yet.
        FingerprintError, HardwareError: as of :func:`load_component`.
        ShapeError: of a call with a size or batch that the engines were not built for.
    """
    folder = Path(folder)
    if public_key is not None:
        check_signature(folder, Path(public_key))
    fastest: Mapping[str, Path] = {}
    if (folder / RELEASE).is_file():
        chosen = choose(folder, device, fallback) if target is None else profile_of(folder, target)
        if chosen is None:
            return _load_torch_pipeline(folder, weights, device)
        folder = chosen
    elif target is not None:
        folder = _bundles_of(folder, target)
    elif (folder / "bundles").is_dir():
        folder, fastest = choose_alternatives(folder, device)
    rest = folder / PIPELINE
    packed = manifests.read(rest, Pipeline)
    _check_listed(rest, packed, ["model_index.json"])
    family = family_of(rest)
    _check_needed(rest, packed, family)
    check_complete(folder, tuple(family.components))
    bundles = {name: fastest.get(name, folder / name) for name in family.components}
    with _importing(family.class_name):
        engines = {
            name: load_component(bundle, device, threads=threads)
            for name, bundle in bundles.items()
        }
    diffusers: Any = importlib.import_module("diffusers")  # untyped
    from diffusion_engines.serve.pipelines import engine_pipeline_class

    model = _read_model(rest)
    modules: dict[str, Any] = {}
    for name, component in family.components.items():
        engine, place = engines[name], bundles[name].parent
        check_place(place, name, engine.manifest)
        check_weights(place, engine.manifest, packed, component.folder)
        engine.pixels_per_latent = family.pixels_per_latent(model.configs)
        adapter = pkgutil.resolve_name(component.adapter)
        modules[component.folder] = adapter(engine, model.configs[name])
    for encoder, tokenizer in model.tokenizers.items():
        modules[family.tokenizers[encoder]] = tokenizer
    scheduler = _scheduler_class(model.scheduler_config, rest)
    modules["scheduler"] = scheduler.from_config(model.scheduler_config)
    cls = engine_pipeline_class(
        getattr(diffusers, family.class_name), family.denoiser.folder, family.around_loop
    )
    return cls(**modules, **family.options(model.index))


@contextlib.contextmanager
def _importing(class_name: str) -> Iterator[None]:
    """Import a class of diffusers, and all that it takes, beside what happens within.

    That is most of what a new process waits for; reading weights leaves the interpreter idle.
    """
    importlib.import_module("torch")  # what both need

    def import_class() -> None:
        # Whoever takes the class gets the error.
        with contextlib.suppress(Exception):
            getattr(importlib.import_module("diffusers"), class_name)
            importlib.import_module("diffusion_engines.serve.pipelines")

    thread = threading.Thread(target=import_class, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _bundles_of(artifacts: Path, target: str) -> Path:
    folder = artifacts / "bundles" / target
    if not folder.is_dir():
        raise ConfigError(
            f"{artifacts} has no target {target}",
            expected=", ".join(sorted(path.name for path in folder.parent.glob("*")))
            or "a folder bundles with targets, as artifacts has, or a release",
            found=target,
        )
    return folder


def _load_torch_pipeline(
    release: Path, weights: str | PathLike[str] | None, device: str | None
) -> Any:
    """Return the diffusers pipeline of the weights that a release was made from."""
    import torch

    if weights is None:
        raise ConfigError(
            'fallback="pytorch" needs the weights, which a release does not have',
            expected="weights=…, a diffusers folder such as artifacts/weights",
            found="none",
            fix='copy them there with their manifests, or take fallback="generic"',
        )
    diffusers: Any = importlib.import_module("diffusers")
    folder = Path(weights)
    rest = next(path.parent for path in sorted(release.glob(f"*/{PIPELINE}/{MANIFEST}")))
    for name, expected in manifests.read(rest, Pipeline).weights.items():
        if (found := manifests.read(folder / name, Weights).digest) != expected:
            raise IntegrityError(
                f"{folder / name} has other weights than {release} was made from",
                expected=f"digest {expected[:12]}",
                found=f"digest {found[:12]}",
                fix="copy the weights that it was made from, with their manifests",
            )
    family = family_of(folder)
    index = read_json(folder / "model_index.json")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = getattr(diffusers, family.class_name).from_pretrained(
        folder,
        dtype=torch.float32 if where == "cpu" else torch.float16,
        **family.options(index),
    )
    return pipeline.to(where)


def _read_model(folder: Path) -> Model:
    from diffusion_engines.runtime.sampling import load_model

    try:
        return load_model(folder)
    except DiffusionEnginesError:
        raise
    except Exception as error:  # of diffusers, transformers and tokenizers, in whichever way
        raise IntegrityError(
            f"{folder} cannot be read as a model",
            expected="a diffusers folder without its weights, as `pack` writes it",
            found=f"{type(error).__name__}: {str(error)[:800]}",
            fix="copy the whole folder again, or run `dvc repro`",
        ) from error


def _scheduler_class(config: Mapping[str, Any], folder: Path) -> Any:
    name = config.get("_class_name")
    found = scheduler_class(name)
    if found is None:
        raise IntegrityError(
            f"{folder / SCHEDULER_CONFIG} names no scheduler",
            expected="_class_name: a scheduler of the installed diffusers",
            found=str(name),
            fix="copy the whole folder again, or install the diffusers that it was made with",
        )
    return found


def _check_needed(folder: Path, packed: Pipeline, family: Family) -> None:
    """Raise IntegrityError where a manifest lacks a file without which no pipeline can be made.

    The vocabularies among them: of a tokenizer that lacks its own, transformers makes one up.
    """
    configs = [f"{component.folder}/config.json" for component in family.components.values()]
    needed = [SCHEDULER_CONFIG, *configs]
    choices = {names for sets in family.tokenizer_files.values() for names in sets}
    for tokenizer in family.tokenizers.values():
        files = [[f"{tokenizer}/{name}" for name in names] for names in sorted(choices)]
        if not any(packed.files.keys() >= {*names} for names in files):
            needed += files[-1]
    _check_listed(folder, packed, needed)


def _check_listed(folder: Path, packed: Pipeline, needed: Sequence[str]) -> None:
    listed = {*packed.files}
    if missing := [name for name in needed if name not in listed]:
        raise IntegrityError(
            f"{folder} lacks {', '.join(missing)}",
            expected="all that a pipeline needs besides its engines",
            found=", ".join(sorted(listed)) or "no files",
            fix="copy the whole folder again, or run `dvc repro`",
        )


def check_place(folder: Path, component: str, engine: Engine) -> None:
    """Raise IntegrityError where the engine in a component's folder is of another one."""
    if engine.component != component:
        raise IntegrityError(
            f"{folder / component} holds the engine of another component",
            expected=component,
            found=f"{engine.name}, of the component {engine.component}",
            fix="copy the whole folder again, or run `dvc repro`",
        )


def check_complete(folder: Path, components: tuple[str, ...]) -> None:
    """Raise IntegrityError where a target's folder lacks the engine of a component."""
    missing = [name for name in components if not (folder / name / MANIFEST).is_file()]
    if missing:
        raise IntegrityError(
            f"{folder} has no engine of {', '.join(missing)}",
            expected=f"a bundle of each of {', '.join(components)}",
            found=", ".join(sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))),
            fix="add the engines to the fleet (conf/fleet/) and run `make repro`; or copy the\n"
            "whole folder",
        )


def _device(manifest: Bundle, device: str | None) -> str:
    built_for = device_of_engine(manifest)
    if device is None:
        return built_for
    if not is_device(device, built_for):
        raise HardwareError(
            f"the engine {manifest.name} does not run on {device}",
            expected=built_for,
            found=device,
            fix="leave `device` out, or load the engines of another target; to choose among\n"
            "several GPUs, set CUDA_VISIBLE_DEVICES",
        )
    return built_for


def check_weights(folder: Path, engine: Engine, packed: Pipeline, network: str) -> None:
    """Compare what an engine was made from with what its pipeline was packed from.

    Format 1 recorded no digests: there the models' names must do.

    Args:
        folder: all bundles of a target.
        engine: the manifest of one of them.
        packed: the manifest of the pipeline beside them.
        network: the folder of the engine's weights in the model.

    Raises:
        IntegrityError: they are of different models, or of other weights of the same one.
    """
    fix = "copy the whole folder again, or run `dvc repro`"
    if engine.model != packed.model:
        raise IntegrityError(
            f"{folder} mixes engines of different models",
            expected=f"{packed.model}, as in {PIPELINE}/{MANIFEST}",
            found=f"{engine.model}, in {engine.component}/{MANIFEST}",
            fix=fix,
        )
    graph, expected = engine.onnx, packed.weights.get(network)
    if expected is not None and graph.weights not in (None, expected):
        loras = packed.loras.get(network, ())
        raise IntegrityError(
            f"{folder} mixes engines of different weights of {packed.model}",
            expected=f"{_origin(packed, loras, expected)}, as in {PIPELINE}/{MANIFEST}",
            found=f"{_origin(graph, graph.loras, graph.weights)}, in {engine.component}/{MANIFEST}",
            fix=fix,
        )


def _origin(made: Pipeline | Graph, loras: Sequence[FusedLora], digest: str | None) -> str:
    """Say for people which weights these are, e.g. ``hub/model at 133a221b8aa7, with a LoRA``."""
    parts = [f"{made.repo} at {made.revision}"] if made.repo else []
    parts += [f"random numbers of seed {made.seed}"] if made.synthetic else []
    parts += [f"with {lora}" for lora in loras]
    return ", ".join([*parts, f"digest {str(digest)[:12]}"])
