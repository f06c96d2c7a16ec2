"""Servers of DVC remotes on this machine's loopback: S3 by rclone, SFTP by OpenSSH."""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.waiting import wait_for

# Where Debian has sshd, which may not be on a person's PATH.
_SYSTEM = os.pathsep.join(["/usr/sbin", "/usr/bin", "/sbin", "/bin"])


@dataclass(frozen=True)
class Server:
    """A remote that runs.

    Attributes:
        port: that it listens on.
        folder: in which it keeps what it is given.
        url: of a DVC remote.
        settings: of that remote, the port left out; none is a secret.
        secrets: likewise, for `.dvc/config.local` alone.
        wrong: secrets that open nothing.
        port_setting: how DVC is told the port: a setting, and its value with `{port}`.
    """

    port: int
    folder: Path
    url: str
    settings: dict[str, str]
    secrets: dict[str, str]
    wrong: dict[str, str]
    port_setting: tuple[str, str]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def program(name: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], _SYSTEM])
    found = shutil.which(name, path=path)
    assert found, f"{name} is not installed: `make test-fleet` installs it"
    return found


@contextmanager
def s3(folder: Path, scratch: Path) -> Iterator[Server]:
    """Serve ``folder`` by S3's protocol, with one bucket, `engines`."""
    (folder / "engines").mkdir()
    port, key, secret = free_port(), secrets.token_hex(8), secrets.token_hex(20)
    command = [
        *(program("rclone"), "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}"),
        # Tests damage objects behind its back. With 0, rclone 1.75.2 takes ten times as long for
        # each object as for the one before.
        *(
            "--vfs-cache-mode",
            "off",
            "--dir-cache-time",
            "10ms",
            "--no-cleanup",
            "--config",
            str(scratch / "rclone.conf"),
        ),
    ]
    # In the environment, as whoever lists processes sees their arguments.
    env = os.environ | {"RCLONE_AUTH_KEY": f'"{key},{secret}"'}  # CSV: a pair is one value
    server = Server(
        port,
        folder,
        "s3://engines/cache",
        {"region": "us-east-1"},
        {"access_key_id": key, "secret_access_key": secret},
        {"access_key_id": key, "secret_access_key": secrets.token_hex(20)},
        ("endpointurl", "http://127.0.0.1:{port}"),
    )
    with _running(command, port, scratch / "rclone.log", env):
        yield server


@contextmanager
def ssh(folder: Path, scratch: Path) -> Iterator[Server]:
    """Serve ``folder`` by SFTP, to who has the key."""
    port = free_port()
    keys = {name: scratch / name for name in ("host", "client", "stranger")}
    for path in keys.values():
        command = [program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
        subprocess.run(command, check=True)
    (scratch / "authorized").write_text((scratch / "client.pub").read_text())
    config = scratch / "sshd_config"
    config.write_text(
        f"ListenAddress 127.0.0.1:{port}\n"
        f"HostKey {keys['host']}\n"
        f"AuthorizedKeysFile {scratch / 'authorized'}\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPidFile none\n"
        "KbdInteractiveAuthentication no\nSubsystem sftp internal-sftp\n"
        "ForceCommand internal-sftp\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd gives up its rights
    server = Server(
        port,
        folder,
        f"ssh://127.0.0.1{folder}/cache",
        {"user": getpass.getuser()},
        {"keyfile": str(keys["client"])},
        {"keyfile": str(keys["stranger"])},
        ("port", "{port}"),
    )
    command = [program("sshd"), "-D", "-e", "-f", str(config)]
    with _running(command, port, scratch / "sshd.log", dict(os.environ)):
        yield server


@contextmanager
def _running(command: list[str], port: int, log: Path, env: dict[str, str]) -> Iterator[None]:
    with (
        log.open("w") as file,
        subprocess.Popen(command, stdout=file, stderr=file, env=env) as process,
    ):

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            with socket.socket() as one:
                return one.connect_ex(("127.0.0.1", port)) == 0

        try:
            wait_for(answers)
            yield
        finally:
            process.terminate()
