"""Leases: what each clone needs of the objects that it shares, in a file beside them."""

from __future__ import annotations

import hashlib
import json
import socket
import tempfile
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from diffusion_engines.errors import IntegrityError
from diffusion_engines.files import text_from_json

FORMAT = 1
_ID = Path(".dvc/tmp/clone")


@dataclass(frozen=True)
class Lease:
    """What a clone needs.

    Attributes:
        clone: its name: 16 hexadecimal digits.
        where: the machine and the folder that it is in, for people.
        written: when, ISO 8601 in UTC.
        objects: MD5s, sorted, with ``.dir`` for the list of a folder's files.
    """

    clone: str
    where: str
    written: str
    objects: tuple[str, ...]


def lease_of(root: Path, needed: set[str]) -> Lease:
    """Return the lease of the clone in ``root``, as of now."""
    root = root.resolve()
    where = f"{socket.gethostname()}:{root}"
    written = datetime.now(UTC).isoformat(timespec="seconds")
    return Lease(_name(root, where), where, written, tuple(sorted(needed)))


def write_lease(odb: Any, lease: Lease) -> None:
    """Put a lease beside the objects of ``odb``, in place of this clone's earlier one."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "lease")
        file.write_text(text_from_json({"format": FORMAT, **asdict(lease)}))
        path = _path(odb, lease.clone)
        odb.fs.makedirs(odb.fs.parent(path), exist_ok=True)
        # A lease that is half written does not parse, and stops every collection.
        partial = odb.fs.join(odb.fs.parent(path), f".{lease.clone}.partial")
        odb.fs.put_file(str(file), partial)
        odb.fs.move(partial, path)


def read_leases(odb: Any) -> list[Lease]:
    """Return every clone's lease on the objects of ``odb``.

    Raises:
        IntegrityError: one cannot be read, so that what its clone needs is not known.
    """
    folder = odb.fs.parent(_path(odb, ""))
    if not odb.fs.exists(folder):
        return []
    paths = [path for path in odb.fs.find(folder) if path.endswith(".json")]
    return [_lease(odb.fs, path) for path in sorted(paths)]


def _lease(fs: Any, path: str) -> Lease:
    try:
        with fs.open(path, "rb") as file:
            data = json.loads(file.read())
        if data.pop("format") != FORMAT:
            raise ValueError("of another format")
        return Lease(**data | {"objects": tuple(data["objects"])})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IntegrityError(
            f"the lease {path} cannot be read: what its clone needs is not known",
            expected=f"a lease of format {FORMAT}",
            found=f"{type(error).__name__}: {error}",
            fix="`diffusion-engines lease` in that clone, or remove the file if the clone is gone",
        ) from error


def _path(odb: Any, clone: str) -> str:
    # DVC keeps objects in files/md5/.
    return str(odb.fs.join(odb.fs.parent(odb.fs.parent(odb.path)), "leases", f"{clone}.json"))


def _name(root: Path, where: str) -> str:
    """Return a name that a copy of the folder, and a machine of the same name, do not share."""
    path = root / _ID
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex)
    return hashlib.sha256(f"{path.read_text()} {where}".encode()).hexdigest()[:16]
