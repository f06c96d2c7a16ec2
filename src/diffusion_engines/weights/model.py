"""Check a diffusers folder against what its family declares, before anything is built on it.

All that is wrong with a folder is said at once.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from diffusion_engines.config import Dynamic, Image
from diffusion_engines.errors import WeightsError
from diffusion_engines.families import family_of
from diffusion_engines.families.base import (
    SCHEDULER_CONFIG,
    Component,
    Family,
    Keys,
    Model,
    outputs_of,
)
from diffusion_engines.families.noise_schedules import (
    changed_by,
    scheduler_class,
    scheduler_from_config,
)
from diffusion_engines.runtime.networks import (
    NetworkModule,
    network_class,
    network_from_config,
    read_config,
    read_object,
    tensor_dtype,
)
from diffusion_engines.weights.check import stored_tensors
from diffusion_engines.weights.lora import in_checkpoint

# What a network's weights may be stored in; 8-bit formats come with scales that nothing here reads.
_DTYPES = ("F64", "F32", "F16", "BF16")
# Buffers that old checkpoints carry, and neither library reads.
_LEFT_OVER = re.compile(r"(^|\.)position_ids$")
# Attention of 2022 in diffusers' VAEs, which it still reads.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION = re.compile(rf"\.({'|'.join(_OLD_NAMES)})\.(weight|bias)$")
_SHOWN = 3
# Of latents, to try a network with; UNets halve it a few times.
_EDGE = 64
# To try a scheduler with: some take no single step, others not many.
_STEPS = 4


def check_model(folder: Path, *, name: str, weights: bool = True) -> None:
    """Check that engines of a model's family compute what the model does.

    Its classes, the keys of its configs, what its networks have to agree on, its tokenizers, its
    noise schedule, and the names, shapes and dtypes of its tensors.

    Args:
        folder: a diffusers model.
        name: of it, for a message.
        weights: whether the weights are there to be compared.

    Raises:
        WeightsError: a file is missing or damaged, or says what no engine does; the message names
            everything that is wrong.
        ConfigError: as of ``family_of``.
    """
    family = family_of(folder)
    index = read_object(folder / "model_index.json")
    problems = [
        *_wrong_classes(family, index),
        *_wrong_keys(family.keys, index, "model_index.json"),
    ]
    configs: dict[str, dict[str, Any]] = {}
    networks: dict[str, Any] = {}
    for component in family.components.values():
        found = _wrong_network(component, folder, weights, configs, networks)
        problems += _or_message(found, folder)
    if configs.keys() == family.components.keys():
        problems += _misfits(family, configs)
        if not problems:
            problems += _wrong_calls(family, Model(family, index, configs, {}, {}), networks)
    for encoder in family.tokenizers:
        found = _wrong_tokenizer(family, folder, index, encoder, configs.get(encoder, {}))
        problems += _or_message(found, folder)
    problems += _or_message(_wrong_schedule(family, folder, index), folder)
    if problems:
        raise WeightsError(
            f"engines cannot be built from {name}",
            expected="what docs/models.md says of its family",
            found="\n".join(problems),
            fix="get the model again if it was copied or converted here; otherwise choose another\n"
            "one (conf/model/)",
        )


def _or_message(problems: Iterator[str], folder: Path) -> Iterator[str]:
    """Yield problems; where looking for them ends in an error, its message."""
    try:
        yield from problems
    except WeightsError as error:
        facts = (
            text
            for text in (error.problem, error.expected and f"expected {error.expected}")
            if text
        )
        found = f", found {error.found}" if error.found else ""
        yield ", ".join(facts).replace(f"{folder}/", "") + found


def _wrong_classes(family: Family, index: Mapping[str, Any]) -> Iterator[str]:
    expected = {
        component.folder: [
            [variant.library, variant.class_name] for variant in (component, *component.variants)
        ]
        for component in family.components.values()
    }
    for folder in family.tokenizers.values():
        expected[folder] = [["transformers", name] for name in family.tokenizer_files]
    for folder, classes in expected.items():
        if index.get(folder) not in classes:
            known = " or ".join(".".join(value) for value in classes)
            yield f"model_index.json: {folder} is {_shown(index.get(folder))}, not {known}"


def _wrong_keys(keys: Keys | None, config: Mapping[str, Any], file: str) -> Iterator[str]:
    for key, only in keys.only.items() if keys else ():
        if key in config and config[key] not in only.values:
            taken = " or ".join(_shown(value) for value in only.values)
            yield f"{file}: {key} is {_shown(config[key])}, not {taken}: {only.why}"


def _wrong_network(
    component: Component,
    model: Path,
    weights: bool,
    configs: dict[str, dict[str, Any]],
    networks: dict[str, Any],
) -> Iterator[str]:
    """Yield what is wrong with a network; put it and its config where the others are."""
    folder, file = model / component.folder, f"{component.folder}/config.json"
    published = read_object(folder / "config.json")
    named = published.get("_class_name", component.class_name)
    if named != component.class_name:
        yield f"{file}: _class_name is {_shown(named)}, not {component.class_name}"
        return
    config = read_config(component, folder)
    wrong = [*_wrong_keys(component.keys, {**config, **published}, file)]
    yield from wrong
    try:
        with torch.device("meta"):
            network = network_from_config(component, published)
    except Exception as error:  # whatever its layers say to their sizes
        if not wrong:
            yield f"{file}: no {component.class_name} can be made of it: {_said(error)}"
        return
    configs[component.name], networks[component.name] = config, network
    if weights:
        yield from _wrong_tensors(component, folder, network)


def _wrong_tensors(component: Component, folder: Path, network: Any) -> Iterator[str]:
    expected = {
        _canonical(component, name): tuple(value.shape)
        for name, value in network.state_dict().items()
    }
    stored = {}
    for name, tensor in stored_tensors(folder).items():
        canonical = _canonical(component, name)
        if canonical not in expected:
            canonical = _OLD_ATTENTION.sub(
                lambda match: f".{_OLD_NAMES[match[1]]}.{match[2]}", canonical
            )
        if not _LEFT_OVER.search(canonical) or canonical in expected:
            stored[canonical] = tensor
    ignored = getattr(network_class(component), "_keys_to_ignore_on_load_unexpected", None) or ()
    where = component.folder
    missing = [name for name in expected if name not in stored]
    unknown = [
        name
        for name in stored
        if name not in expected and not any(re.search(pattern, name) for pattern in ignored)
    ]
    if missing:
        yield f"{where}: {_some(missing)} missing, which its config asks for"
    if unknown:
        yield f"{where}: {_some(unknown)} not in a {component.class_name} of its config"
    other = [name for name in expected if name in stored and stored[name].shape != expected[name]]
    for name in other[:_SHOWN]:
        found, wanted = stored[name].shape, expected[name]
        yield f"{where}: {name} has the shape {found}, not {wanted} as its config asks for"
    if len(other) > _SHOWN:
        yield f"{where}: and {len(other) - _SHOWN} more of other shapes"
    foreign = {t.dtype for n, t in stored.items() if n in expected} - {*_DTYPES}
    if foreign:
        yield f"{where}: weights in {', '.join(sorted(foreign))}, not in {', '.join(_DTYPES)}"


def _canonical(component: Component, name: str) -> str:
    # transformers reads its CLIP encoders with and without this.
    return in_checkpoint(name) if component.library == "transformers" else name


def _misfits(family: Family, configs: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for fit in family.fits:
        value, expected = fit.value(configs), fit.expected(configs)
        if value != expected:
            yield f"{fit.one}: {_shown(value)}; {fit.other}: {_shown(expected)}"


def _wrong_calls(family: Family, model: Model, networks: Mapping[str, Any]) -> Iterator[str]:
    """Yield which networks cannot do what engines do, on shapes alone."""
    factor = family.pixels_per_latent(model.configs)
    edge = _EDGE * factor
    image = Image(height=edge, width=edge, batch_size=1, vae_scale_factor=factor)
    for name, component in family.components.items():
        module = NetworkModule(component, networks[name]).eval()
        try:
            inputs = component.inputs(model.configs[name], image, Dynamic(None, None, None))
            tensors = [
                torch.empty(spec.size, dtype=tensor_dtype(spec.dtype, torch.float32), device="meta")
                for spec in inputs
            ]
            with torch.no_grad():
                if component is family.decoder:
                    result = family.decode({name: module}, model, tensors[0])
                else:
                    result = outputs_of(module(*tensors))[0]
        except Exception as error:  # whatever its layers say to what they are given
            yield f"{component.folder}: cannot be called as engines are: {_said(error)}"
            continue
        expected = {"denoiser": _EDGE, "decoder": edge}.get(component.role)
        found = tuple(result.shape[-2:])
        if expected is not None and found != (expected, expected):
            yield f"{component.folder}: makes {found} of latents {(_EDGE, _EDGE)}, not {expected}"


def _wrong_tokenizer(
    family: Family,
    model: Path,
    index: Mapping[str, Any],
    encoder: str,
    config: Mapping[str, Any],
) -> Iterator[str]:
    name = family.tokenizers[encoder]
    entry, folder = index.get(name), model / name
    class_name = str(entry[-1]) if isinstance(entry, list) and entry else ""
    if class_name not in family.tokenizer_files:
        return  # as said already
    sets = family.tokenizer_files[class_name]
    if not any(all(_holds(folder / file) for file in files) for files in sets):
        wanted = " or ".join(" and ".join(files) for files in sets)
        # Without any, transformers makes up a vocabulary of two tokens.
        yield f"{name}: {wanted} missing or empty"
        return
    cls = getattr(importlib.import_module("transformers"), class_name)
    try:
        tokenizer = cls.from_pretrained(folder, local_files_only=True)
        ids = tokenizer("a", max_length=family.tokens, padding="max_length").input_ids
        vocabulary = tokenizer.get_vocab()
    except Exception as error:  # the tokenizers' library raises Exception itself
        yield f"{name}: no {class_name} can be made of it: {_said(error)}"
        return
    if tokenizer.model_max_length != family.tokens:
        yield (
            f"{name}: model_max_length is {tokenizer.model_max_length}, not {family.tokens}, "
            "which is the length of the text encoder's input"
        )
    known, largest = config.get("vocab_size"), max(vocabulary.values())
    if known is not None and largest >= known:
        yield f"{name}: has a token {largest}, and the text encoder's vocab_size is {known}"
    end = tokenizer.eos_token_id
    if ids[0] != tokenizer.bos_token_id or end not in ids:
        yield f"{name}: puts no token of the begin before a text, or none of the end after it"
    if "pooled embedding" in family.components[encoder].gives and config:
        # It is taken at the end, for which 2 in old configs means the largest token:
        # https://github.com/huggingface/transformers/pull/24773
        wanted = largest if config["eos_token_id"] == 2 else config["eos_token_id"]
        if end != wanted:
            yield f"{name}: ends a text with {end}, and {encoder} looks for {wanted}"


def _holds(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _wrong_schedule(family: Family, model: Path, index: Mapping[str, Any]) -> Iterator[str]:
    file = SCHEDULER_CONFIG
    config = read_object(model / file)
    named, entry = config.get("_class_name"), index.get("scheduler")
    if entry != ["diffusers", named]:
        yield f"model_index.json: scheduler is {_shown(entry)}, and {file} is of {_shown(named)}"
    cls = scheduler_class(named)
    if cls is None:
        yield f"{file}: diffusers has no scheduler {_shown(named)}"
        return
    try:
        scheduler_from_config(cls, config).set_timesteps(_STEPS)
        changed = {name: changed_by(s, config) for name, s in family.schedulers.items()}
    except Exception as error:  # of betas and the like that make no schedule
        yield f"{file}: no {named} can be made of it: {_said(error)}"
        return
    if all(changed.values()):
        keys = sorted({key for values in changed.values() for key in values})
        yield (
            f"{file}: none of {', '.join(changed)} keeps to the noise schedule of a {named}: they "
            f"have another {', '.join(keys)}"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    verb = "is" if len(names) == 1 else "are"
    return f"{', '.join(sorted(names)[:_SHOWN])}{more} {verb}"


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return ".".join(value)
    return str(value)[:80]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
