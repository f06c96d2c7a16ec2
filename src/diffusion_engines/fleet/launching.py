"""What starts workers: this machine or Slurm, to who waits for them the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from diffusion_engines.fleet.tasks import Desk


@dataclass(frozen=True)
class Look:
    """A worker, as its launcher sees it now.

    Attributes:
        state: where it stands; ``ended`` says nothing of how: that is in its record.
        where: the machine.
        note: why it waits, or what ended it if it did not end by itself.
    """

    state: Literal["queued", "running", "ended"]
    where: str = ""
    note: str = ""


class Launcher(Protocol):
    """Starts workers, looks at them, and ends them."""

    def submit(self, name: str, desk: Desk) -> None:
        """Have a task done, now or when its turn comes.

        Raises:
            DiffusionEnginesError: it was refused.
        """

    def look(self) -> dict[str, Look]:
        """Return what was submitted, by name."""

    def stop(self) -> None:
        """End all workers, with every process that they started, and what waits."""
