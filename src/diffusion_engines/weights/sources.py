"""Fill a diffusers model folder from the hub, from a local folder, or with random weights."""

from __future__ import annotations

import contextlib
import fnmatch
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from diffusion_engines.errors import ConfigError, WeightsError, first_line
from diffusion_engines.families import family_of
from diffusion_engines.files import read_json


def copy_from_hub(repo: str, revision: str, wanted: Sequence[str], destination: Path) -> None:
    """Download one commit of a hub repository; files that were fetched whole before are kept.

    A connection that is silent for ``HF_HUB_DOWNLOAD_TIMEOUT`` seconds (10, unless the environment
    says otherwise) is given up and tried again, a file from where it broke off; after six times
    without a byte the download ends.

    The token comes from the environment (``HF_TOKEN``, or the hub's own login) and is handled by
    huggingface_hub alone.

    Args:
        repo: on the hub.
        revision: a commit.
        wanted: patterns of the files, as of ``Family.wanted``.
        destination: gets the files.

    Raises:
        WeightsError: the hub cannot be reached, or it has no such commit, or it asks for a token.
    """
    import huggingface_hub
    from huggingface_hub import errors

    where = f"{repo} at {revision}"
    try:
        with _clients_that_give_up():
            snapshot = huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=list(wanted)
            )
    except errors.GatedRepoError as error:
        raise WeightsError(
            f"the hub does not give out {where}",
            expected="an account that has accepted the model's licence",
            found="no token, or one of another account",
            fix="accept the licence on the model's page, then `export HF_TOKEN=…`",
        ) from error
    except (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.HFValidationError,
    ) as error:
        raise WeightsError(
            f"the hub has no {where}",
            found=type(error).__name__,
            fix="check model.repo and model.revision (a full commit hash) in conf/model/;\n"
            "a private repository needs `export HF_TOKEN=…`",
        ) from error
    except Exception as error:
        if not _is_network(error):
            raise
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
            raise WeightsError(
                f"the hub does not give out {where}",
                expected="a valid token, of an account that may read the model",
                found=f"HTTP {error.response.status_code}",
                fix="`export HF_TOKEN=…` with another token; for a public model, `unset HF_TOKEN`",
            ) from error
        raise WeightsError(
            f"the hub could not be reached for {where}",
            found=_reason(error),
            fix="check the network, a proxy, or HF_ENDPOINT if you use a mirror, and run again:\n"
            "files that were fetched whole are kept. For a slow network, HF_HUB_DOWNLOAD_TIMEOUT\n"
            "sets how many seconds the hub may be silent. Without a hub: model.source=local with\n"
            "the folder of a downloaded model, or `dvc pull artifacts/weights` from a remote",
        ) from error
    _copy_wanted(Path(snapshot), wanted, destination)


# What httpx waits for: https://www.python-httpx.org/advanced/extensions/#timeout
_WAITS = ("connect", "read", "write", "pool")


@contextlib.contextmanager
def _clients_that_give_up() -> Iterator[None]:
    """Give every request of the hub's library a limit: it has one for files alone.

    A hook and not the client's default, as its lists are asked for with ``timeout=None``.
    """
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def limit(request: Any) -> None:
        waits = request.extensions.get("timeout", {})
        limits = {name: waits.get(name) or constants.HF_HUB_DOWNLOAD_TIMEOUT for name in _WAITS}
        request.extensions = {**request.extensions, "timeout": limits}

    def client() -> Any:
        made = default_client_factory()
        made.event_hooks["request"].append(limit)
        return made

    set_client_factory(client)
    try:
        yield
    finally:
        set_client_factory(default_client_factory)


def hub_progress(repo: str) -> Callable[[], str]:
    """Return what says how much of a hub repository is here, and since when nothing came."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    name = repo_folder_name(repo_id=repo, repo_type="model")
    blobs = Path(constants.HF_HUB_CACHE) / name / "blobs"
    seen, since = _size(blobs), time.monotonic()

    def say() -> str:
        nonlocal seen, since
        if (size := _size(blobs)) != seen:
            seen, since = size, time.monotonic()
        silent = time.monotonic() - since
        text = f"{size / 1e9:.2f} GB are here"
        if silent < constants.HF_HUB_DOWNLOAD_TIMEOUT / 2:
            return text
        return f"{text}; waiting for {constants.ENDPOINT}, silent for {silent:.0f} s"

    return say


def _size(folder: Path) -> int:
    total = 0
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile, as it is whole
            total += path.stat().st_size
    return total


def _reason(error: BaseException) -> str:
    """Return in one line what the hub's HTTP library said, where the chain has that."""
    reason, link = error, error.__cause__
    while link is not None:
        if _is_http(link):
            reason = link
        link = link.__cause__
    return first_line(reason)


def _is_http(error: BaseException) -> bool:
    return any(cls.__module__.split(".")[0] in ("httpx", "httpx2") for cls in type(error).__mro__)


def _is_network(error: Exception) -> bool:
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError):  # of this machine, such as a full disk, or of huggingface_hub
        return error.errno is None
    # A transfer that breaks off ends with an exception of the hub's HTTP library, which changes.
    return _is_http(error)


def copy_from_folder(source: Path, destination: Path) -> None:
    """Copy what a pipeline needs of a local diffusers folder.

    Raises:
        WeightsError: the folder is missing or is no diffusers folder.
    """
    if not (source / "model_index.json").is_file():
        raise WeightsError(
            f"{source} is no diffusers model folder",
            expected="model_index.json and the folders that it names",
            found="nothing" if not source.is_dir() else _listing(source),
            fix="correct model.folder in conf/model/; of a checkpoint in one file:\n"
            "model.source=file model.checkpoint=/path/model.safetensors",
        )
    _copy_wanted(source, family_of(source).wanted, destination)


def _copy_wanted(source: Path, wanted: Sequence[str], destination: Path) -> None:
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in wanted):
            target = destination / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def fill_with_random_weights(
    architecture: Path, destination: Path, *, seed: int, dtype: str
) -> None:
    """Write seeded random weights of exactly the architecture whose JSONs a folder holds.

    Latency, memory, file sizes and operator counts are those of the real model; the pictures are
    not. Everything made from them is labelled synthetic.
    """
    import torch

    from diffusion_engines.runtime.networks import network_from_config, precision_dtype

    copy_from_folder(architecture, destination)
    default_dtype = torch.get_default_dtype()
    for component in family_of(destination).components.values():
        folder = destination / component.folder
        config = read_json(folder / "config.json")
        torch.set_default_dtype(precision_dtype(dtype))  # never holds a second, wider copy
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network = network_from_config(component, config)
        finally:
            torch.set_default_dtype(default_dtype)
        save_network(network, folder)


def save_network(network: Any, folder: Path) -> None:
    """Write a network's weights as safetensors into its folder, whose config.json stays as it is.

    Published ones lack keys, for which the network's class has defaults.
    """
    published = (folder / "config.json").read_text()
    network.save_pretrained(folder, safe_serialization=True, max_shard_size="5GB")
    (folder / "config.json").write_text(published)


def check_scale_factor(folder: Path, vae_scale_factor: int) -> None:
    """Check that sizes in pixels become sizes of latents as the model has it.

    Args:
        folder: of a diffusers model, as of :func:`~diffusion_engines.weights.model.check_model`.
        vae_scale_factor: ``image.vae_scale_factor``.

    Raises:
        ConfigError: it is not the model's.
    """
    from diffusion_engines.runtime.networks import read_config

    family = family_of(folder)
    configs = {
        name: read_config(component, folder / component.folder)
        for name, component in family.components.items()
    }
    if (found := family.pixels_per_latent(configs)) != (expected := vae_scale_factor):
        raise ConfigError(
            "image.vae_scale_factor does not fit the model's VAE (conf/model/)",
            expected=str(found),
            found=str(expected),
            fix=f"set image.vae_scale_factor to {found}",
        )


def _listing(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "an empty folder"
