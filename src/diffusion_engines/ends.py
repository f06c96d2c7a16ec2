"""How a process ends when the machine, and not the work, is in the way: with one line that is true.

A full disk, a quota, a limit of the shell, a folder of somebody else's: each has its own words and
its own remedy. What is not known here keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from diffusion_engines.errors import DiffusionEnginesError, HardwareError

# Of git, and of the libgit2 that DVC reads repositories with.
_FOREIGN = ("dubious ownership", "is not owned by current user")


@contextlib.contextmanager
def one_line_at_the_end(name: str) -> Iterator[None]:
    """Run a block; end the process with a message where it fails for a reason that is known.

    Ctrl-C ends it with the status that a shell expects, and so does a reader of the output that
    went away, as in ``| head -1``. What a block has printed is written before it counts as done.

    Args:
        name: of what runs, for the message.
    """
    try:
        try:
            yield
        finally:
            # Else the interpreter would fail at it last of all, and say so in its own words.
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\n{name} interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        _silence_output()
        print(f"{name}: nobody reads the output any more", file=sys.stderr)
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        known = error_with_remedy(error)
        if known is None:
            raise
        sys.exit(str(known))


def error_with_remedy(error: Exception) -> DiffusionEnginesError | None:
    """Return the error itself if it says what to do, or what it comes from and we know better."""
    if isinstance(error, DiffusionEnginesError):
        return error
    return (
        _of_writing(error)
        or _of_access(error)
        or _of_ownership(error)
        or _of_memory(error)
        or _of_warning(error)
        or _of_dvc(error)
    )


def foreign_clone(text: str, root: Path) -> DiffusionEnginesError | None:
    """Return what to do where git says that a repository belongs to somebody else; else None."""
    if not any(words in text for words in _FOREIGN):
        return None
    folder = root.resolve()
    return HardwareError(
        f"git reads nothing in {folder}, which belongs to another user",
        found=f"user {folder.stat().st_uid}, where you are {os.geteuid()}",
        fix="work in a clone of your own; or, if you trust who owns this one:\n"
        f"`git config --global --add safe.directory {folder}`",
    )


def _of_writing(error: Exception) -> DiffusionEnginesError | None:
    found = _in_chain(error, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
    if found is None:
        return None
    name = found.filename2 or found.filename  # of a copy, the second one is what is written
    where = f" for {name}" if name else ""
    if found.errno == errno.EFBIG:
        return _too_large(where)
    if not name and not _output_takes_more():
        _silence_output()
        return HardwareError(
            "the output could not be written: no space left where it is redirected to",
            fix="send it somewhere else",
        )
    if found.errno == errno.EDQUOT:
        return HardwareError(
            f"your disk quota is used up{where}", fix=f"ask for more, or {_MAKE_ROOM}"
        )
    return HardwareError(
        f"no space left on the disk{where}",
        found="; ".join(_free(folder) for folder in dict.fromkeys(_folders(found))),
        fix=_MAKE_ROOM,
    )


_MAKE_ROOM = (
    "free some space (`dvc gc --workspace` drops what no longer belongs to this\n"
    "workspace), or move the cache to another disk: `dvc cache dir --local PATH`"
)


def _too_large(where: str) -> DiffusionEnginesError:
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit == resource.RLIM_INFINITY:
        return HardwareError(
            f"a file became larger than its file system takes{where}",
            fix="work on another file system: FAT ends at 4 GB",
        )
    return HardwareError(
        f"a file became larger than this shell's limit on files{where}",
        found=f"a limit of {limit} bytes",
        fix="`ulimit -f unlimited`, or what your batch system calls it",
    )


def _in_chain(error: BaseException | None, numbers: tuple[int, ...]) -> OSError | None:
    """Find an error number in an exception chain, or its text in a native library's exception."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in numbers:
            return error
        for number in numbers:
            if os.strerror(number) in str(error):
                return OSError(number, os.strerror(number))
        error = error.__cause__ or error.__context__
    return None


def _output_takes_more() -> bool:
    try:
        os.write(sys.stdout.fileno(), b"\n")
    except OSError as error:  # a test's stand-in for the output has no number
        return error.errno is None
    return True


def _silence_output() -> None:
    """Give the interpreter, which writes what is left at its end, a place where it can.

    https://docs.python.org/3/library/signal.html#note-on-sigpipe
    """
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _folders(error: OSError) -> Iterator[Path]:
    if name := error.filename2 or error.filename:
        yield next(p for p in Path(os.fsdecode(name)).absolute().parents if p.exists())
    yield Path.cwd()
    yield Path(tempfile.gettempdir())


def _free(folder: Path) -> str:
    text = f"{shutil.disk_usage(folder).free / 1e9:.2f} GB free in {folder}"
    return text if os.statvfs(folder).f_favail else f"{text}, but no inodes for more files"


def _of_access(error: Exception) -> DiffusionEnginesError | None:
    if not isinstance(error, OSError) or not error.filename:
        return None
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
        return None
    return HardwareError(
        f"no access to {os.fsdecode(error.filename)}: {error.strerror}",
        fix="make it readable and writable for you, or work in a clone of your own",
    )


def _of_ownership(error: Exception) -> DiffusionEnginesError | None:
    return foreign_clone(str(error), Path.cwd())


def _of_memory(error: Exception) -> DiffusionEnginesError | None:
    if not isinstance(error, MemoryError):
        return None
    return HardwareError(
        "out of memory",
        fix="close other programs, or run this stage on a machine with more memory",
    )


def _of_warning(error: Exception) -> DiffusionEnginesError | None:
    """A warning is raised where ``PYTHONWARNINGS=error`` or ``-W error`` asks for it."""
    if not isinstance(error, Warning):
        return None
    return HardwareError(
        f"a library's warning was made an error: {type(error).__name__}: {error}",
        fix="run it without PYTHONWARNINGS=error: libraries warn of what the next release changes",
    )


def _of_dvc(error: Exception) -> DiffusionEnginesError | None:
    """DVC's own errors are for people."""
    if "dvc" not in sys.modules:
        return None
    from dvc.exceptions import DvcException

    if not isinstance(error, DvcException):
        return None
    return DiffusionEnginesError(f"DVC: {error}")
