"""What a path held when it had a hash that DVC recorded: found in git, whose commits are near it.

DVC keeps the hash of a dependency, and of a folder of code no listing.
"""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

from diffusion_engines.plan.contents import Listing, hash_of_bytes, hash_of_listing

# Commits that touched a path, to look through.
_DEPTH = 20


@functools.cache
def committed(root: Path, path: str, value: str) -> dict[str, bytes] | None:
    """Return the files of a path in the newest commit in which it has a hash of DVC.

    By relative path; that of a file is empty. None where no recent commit has it, or git is not
    there.
    """
    for revision in _git(root, "log", f"--max-count={_DEPTH}", "--format=%H", "--", path).split():
        files = _files(root, revision.decode(), path)
        if files and _hash(files) == value:
            return files
    return None


def listing_of(files: dict[str, bytes]) -> Listing:
    """Return DVC's hashes of files."""
    return {name: hash_of_bytes(content) for name, content in files.items()}


def _hash(files: dict[str, bytes]) -> str:
    listed = listing_of(files)
    return listed[""] if "" in listed else hash_of_listing(listed)


def _files(root: Path, revision: str, path: str) -> dict[str, bytes]:
    names = [
        name.decode()
        for name in _git(root, "ls-tree", "-r", "-z", "--name-only", revision, "--", path).split(
            b"\0"
        )
        if name
    ]
    # Each as "<hash> <type> <size>", a line's end, the content and a line's end.
    asked = "".join(f"{revision}:./{name}\n" for name in names).encode()
    output, files = _git(root, "cat-file", "--batch", stdin=asked), {}
    for name in names:
        head, _, rest = output.partition(b"\n")
        size = int(head.split()[-1])
        files[name[len(path) + 1 :]], output = rest[:size], rest[size + 1 :]
    return files


def _git(root: Path, *arguments: str, stdin: bytes = b"") -> bytes:
    done = subprocess.run(
        ["git", *arguments], cwd=root, input=stdin, capture_output=True, check=False
    )
    return b"" if done.returncode else done.stdout
