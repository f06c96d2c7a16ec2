"""What `make pull` and `make push` do, and what `make repro` asks a remote before it runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from diffusion_engines.errors import ConfigError, RemoteError
from diffusion_engines.remotes.transfers import Transfer, fetch, push
from diffusion_engines.remotes.watching import SILENCE, watched
from diffusion_engines.runs import refuse_during_a_run
from diffusion_engines.wording import some


def has_remote(root: Path) -> bool:
    """Whether DVC's configuration names a default remote.

    Raises:
        ConfigError: it cannot be read.
    """
    from dvc.config import Config
    from dvc.config import ConfigError as DvcConfigError

    try:
        return bool(Config(dvc_dir=str(root / ".dvc"))["core"].get("remote"))
    except DvcConfigError as error:
        raise ConfigError("DVC's configuration cannot be read", found=str(error)) from error


def fetch_before_run(root: Path, *, silence: float = SILENCE) -> bool:
    """Fetch what a run would otherwise make again, and say what could not be had.

    Return whether DVC may ask the remote: it answers, and something is left to ask for. Without
    a default remote nothing happens.

    Args:
        root: of the repository.
        silence: seconds without a byte after which the remote is given up.
    """
    if not has_remote(root):
        return False
    try:
        done = watched(partial(fetch, current=True), root, silence=silence)
    except RemoteError as error:
        print(f"{error}\nThe remote was skipped: what is not in the local cache is made here.")
        return False
    _print_fetched(done)
    if lost := [*done.damaged, *done.missing]:
        print(f"Their stages make them again here: {some(lost)}")
    # DVC would fetch a damaged object once more, and fail.
    return done.wanted and not done.damaged


def pull_outputs(root: Path, *, silence: float = SILENCE) -> Transfer:
    """Fetch all that dvc.lock names, put it into the workspace, and say what could not be had.

    Args:
        root: of the repository.
        silence: seconds without a byte after which the remote is given up.

    Raises:
        BusyError: a run works there.
        ConfigError: there is no remote, or a file in the workspace is in no cache.
        RemoteError: the remote refuses or cannot be reached.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    _ask_for_remote(root)
    refuse_during_a_run(root)
    done = watched(fetch, root, silence=silence)
    try:
        with Repo(str(root)) as repo:
            repo.checkout(allow_missing=True)
    except DvcException as error:
        raise ConfigError(
            "what was fetched cannot be put into the workspace",
            found=str(error),
            fix="`dvc checkout --force`, which gives up what the message names",
        ) from error
    _print_fetched(done)
    return done


def push_outputs(root: Path, *, silence: float = SILENCE) -> Transfer:
    """Bring what dvc.lock names to the remote, and say what came of it.

    Args:
        root: of the repository.
        silence: seconds without a byte after which the remote is given up.

    Raises:
        ConfigError: there is no remote.
        RemoteError: the remote refuses, is full or cannot be reached.
    """
    _ask_for_remote(root)
    done = watched(push, root, silence=silence)
    print(f"{done.objects} objects pushed, {done.bytes / 1e6:,.1f} MB")
    if done.missing:
        print(f"neither here nor on the remote: {some(done.missing)}")
    if done.failed:
        raise RemoteError(
            "not all could be pushed",
            found=done.failed,
            fix="make room or mend what is named, and push again: it goes on from there",
        )
    return done


def _ask_for_remote(root: Path) -> None:
    if not has_remote(root):
        raise ConfigError(
            "there is no remote",
            expected="a default remote in .dvc/config",
            found="none",
            fix="`dvc remote add -d shared URL`",
        )


def _print_fetched(done: Transfer) -> None:
    if done.objects:
        print(f"{done.objects} objects fetched, {done.bytes / 1e6:,.1f} MB")
    if done.damaged:
        print(f"damaged on the remote, and not taken: {some(done.damaged)}")
    if done.missing:
        print(f"missing on the remote: {some(done.missing)}")
