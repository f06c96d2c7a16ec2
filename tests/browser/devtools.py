"""Chromium without a window, driven through its DevTools protocol over two pipes.

https://chromedevtools.github.io/devtools-protocol/; a message is JSON and ends in a NUL byte. Pipes
(``--remote-debugging-pipe``) need neither a port nor a WebSocket library.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FLAGS = (
    "--headless",
    "--hide-scrollbars",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
# Of one answer; a screenshot of the whole page is the slowest.
_TIMEOUT_SECONDS = 60.0


@dataclass
class Page:
    """A tab; ``events`` holds what it reported so far, by method and parameters."""

    reader: int
    writer: int
    session: str = ""
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    _sent: int = 0
    _received: bytes = b""

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result.

        Raises:
            RuntimeError: the browser refuses it.
            TimeoutError: the browser does not answer.
        """
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._sent:
                break
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def wait_for(self, method: str) -> None:
        """Wait for an event that has not come yet."""
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while method not in [name for name, _ in self.events]:
            self._receive(deadline)

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._received:
            ready, _, _ = select.select([self.reader], [], [], max(deadline - time.monotonic(), 0))
            data = os.read(self.reader, 1 << 20) if ready else b""
            if not data:
                raise TimeoutError("Chromium does not answer, or it has ended")
            self._received += data
        message, _, self._received = self._received.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        if "method" in found:
            self.events.append((found["method"], found["params"]))
        return found

    def evaluate(self, expression: str) -> Any:
        """Return what an expression of JavaScript gives, as plain data.

        Raises:
            RuntimeError: it throws.
        """
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def open(self, url: str) -> None:
        """Go to a page and wait until it has loaded."""
        self.events.clear()
        self.send("Page.navigate", url=url)
        self.wait_for("Page.loadEventFired")

    def resize(self, width: int, height: int = 900) -> None:
        """Give the window a size in CSS pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def prefer(self, **features: str) -> None:
        """Set what the person prefers: ``color_scheme="dark"``, ``reduced_motion="reduce"``."""
        self.send(
            "Emulation.setEmulatedMedia",
            features=[
                {"name": f"prefers-{name.replace('_', '-')}", "value": value}
                for name, value in features.items()
            ],
        )

    def screenshot(self, box: dict[str, float] | None = None) -> bytes:
        """Return a PNG of a box of the page, in CSS pixels; None: of the whole page."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        found = self.send(
            "Page.captureScreenshot",
            format="png",
            captureBeyondViewport=True,
            clip={**(box or {key: size[key] for key in ("x", "y", "width", "height")}), "scale": 1},
        )
        return base64.b64decode(found["data"])

    def click(self, x: float, y: float) -> None:
        """Press and release the mouse at a place of the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


@contextlib.contextmanager
def browser(program: str, profile: Path) -> Iterator[Page]:
    """Start Chromium with an empty profile and yield a tab of it; end it afterwards."""
    command_reader, writer = _pipe()
    reader, answer_writer = _pipe()
    log = profile.with_suffix(".log")
    process = os.posix_spawn(
        program,
        [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, command_reader, 3),
            (os.POSIX_SPAWN_DUP2, answer_writer, 4),
            (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, str(log), os.O_WRONLY | os.O_CREAT, 0o644),
        ],
        setpgroup=0,
    )
    os.close(command_reader)
    os.close(answer_writer)
    try:
        page = Page(reader, writer)
        target = page.send("Target.createTarget", url="about:blank")["targetId"]
        attached = page.send("Target.attachToTarget", targetId=target, flatten=True)
        page.session = attached["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            page.send(f"{domain}.enable")
        yield page
    finally:
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(reader)
        os.close(writer)


def _pipe() -> tuple[int, int]:
    """Return a pipe out of the way of the numbers that Chromium has its own at: 3 and 4."""
    ends = os.pipe()
    reader, writer = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return reader, writer
