"""A Slurm cluster of virtual nodes on this machine, without systemd and without accounting.

Debian's packages, started as root, each daemon in the foreground and with this process: nothing of
it outlives the tests.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from diffusion_engines.processes import death_with_parent

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge")
# With the folders of daemons, which a user's lacks.
SYSTEM_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "munged")


def why_not() -> str | None:
    """Return why there can be no cluster here; None where there can."""
    if missing := [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]:
        return f"no {', '.join(missing)}: `apt-get install {' '.join(PACKAGES)}`"
    return "slurmd has to be started as root" if os.geteuid() else None


@dataclass
class Cluster:
    """A running cluster.

    Attributes:
        folder: of its configuration and logs.
        nodes: features by the node's name.
    """

    folder: Path
    nodes: Mapping[str, str]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        """For Slurm's commands."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str) -> str:
        """Run a command of Slurm's; return what it prints."""
        return subprocess.run(
            command,
            env=os.environ | self.env,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout

    def jobs(self) -> list[str]:
        """Return the states of the jobs that wait or run."""
        states = "--states=PENDING,RUNNING"
        return self.run("squeue", "--noheader", states, "--format=%T").split()

    def start_node(self, name: str) -> None:
        """Start a node, also one that was killed."""
        self._start(name, ["slurmd", "-D", "-N", name])

    def kill_node(self, name: str) -> None:
        """Take a node away as a power failure does: its daemon and all that it runs."""
        import psutil

        slurmd = self.daemons.pop(name)
        # slurmstepd leaves slurmd's session, and bears the node's name no more.
        steps = [
            process
            for process in psutil.process_iter(["name"])
            if process.info["name"].startswith("slurmstepd") and _node_of(process) == name
        ]
        doomed = [child for step in steps for child in step.children(recursive=True)]
        slurmd.kill()
        slurmd.wait()
        for process in [*steps, *doomed]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def start(self) -> None:
        """Start everything, and wait until every node is idle."""
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        self._start(
            "munged",
            [
                *("munged", "--foreground", "--force", f"--key-file={self.folder}/munge.key"),
                *(f"--socket={self.folder}/munge", f"--pid-file={self.folder}/munge.pid"),
                *(f"--log-file={self.folder}/munge.log", f"--seed-file={self.folder}/munge.seed"),
            ],
        )
        (self.folder / "slurm.conf").write_text(_configuration(self.folder, self.nodes))
        _wait((self.folder / "munge").exists, "munged")
        self._start("slurmctld", ["slurmctld", "-D"])
        for name in self.nodes:
            self.start_node(name)
        _wait(lambda: self._states() == {"idle"}, "the nodes")

    def stop(self) -> None:
        """End what jobs left, and then every daemon."""
        try:
            self.run("scancel", f"--user={os.geteuid()}")
            _wait(lambda: not self.jobs(), "the jobs' end")
        finally:
            for daemon in self.daemons.values():
                daemon.terminate()
            for daemon in self.daemons.values():
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()

    def _states(self) -> set[str]:
        try:
            return {*self.run("sinfo", "--noheader", "--Node", "--format=%t").split()}
        except subprocess.CalledProcessError:
            return set()

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                command,
                env=os.environ | self.env | {"PATH": SYSTEM_PATH},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=death_with_parent(),  # noqa: PLW1509 - no threads here
            )


@contextmanager
def cluster(folder: Path, nodes: Mapping[str, str]) -> Iterator[Cluster]:
    """Run a cluster while a block runs.

    Args:
        folder: for its files; its path has to be short, for a socket lies in it.
        nodes: features by the node's name.
    """
    made = Cluster(folder, nodes)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def _configuration(folder: Path, nodes: Mapping[str, str]) -> str:
    host = socket.gethostname().split(".")[0]
    ports = _free_ports(1 + len(nodes))
    lines = [
        "ClusterName=fleet",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={ports[0]}",
        "SlurmUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge",
        "CredType=cred/munge",
        "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "MpiDefault=none",
        "ReturnToService=2",
        "SchedulerType=sched/backfill",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SchedulerParameters=sched_interval=1,batch_sched_delay=0",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        # Without accounting: submitit would wait for ever for a job that left no result.
        "AccountingStorageType=accounting_storage/none",
        "JobAcctGatherType=jobacct_gather/none",
        # As on most clusters: a node that died is noticed after five minutes.
        "SlurmdTimeout=300",
        "KillWait=5",
    ]
    lines += [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 "
        f"Feature={feature}"
        for (name, feature), port in zip(nodes.items(), ports[1:], strict=True)
    ]
    lines.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
    return "\n".join(lines) + "\n"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _node_of(process: object) -> str:
    """Return the node that a slurmstepd belongs to: its own file names it."""
    import psutil

    assert isinstance(process, psutil.Process)
    for child in process.children(recursive=True):
        with suppress(psutil.Error):
            if node := child.environ().get("SLURMD_NODENAME"):
                return node
    return ""


def _wait(condition: object, what: str, seconds: float = 30) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} after {seconds:.0f} s"
        time.sleep(0.1)
