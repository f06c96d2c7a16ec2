"""A line to a server on this machine that can be slow, silent or cut, as lines of the world are."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

_CHUNK = 64 * 1024


class Line:
    """Forwards connections to a port of this machine, until told otherwise."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listening]
        self.port: int = self._listening.getsockname()[1]
        self.passed = 0  # bytes, in both directions
        self.after, self.then = float("inf"), ""
        self.rate = float("inf")  # bytes a second
        self._open = threading.Event()
        self._open.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def go_silent(self, after: int = 0) -> None:
        """Take connections and bytes, and forward none."""
        self.after, self.then = self.passed + after, "silent"

    def break_off(self, after: int) -> None:
        """Close all connections once ``after`` more bytes went through, and take none any more."""
        self.after, self.then = self.passed + after, "cut"

    def close(self) -> None:
        self.then = "cut"
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        while self.then != "cut":
            try:
                here, _ = self._listening.accept()
                there = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                return
            self._sockets += [here, there]
            for ends in ((here, there), (there, here)):
                threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while chunk := source.recv(_CHUNK):
                if self.passed >= self.after:
                    if self.then == "cut":
                        self.close()
                        return
                    threading.Event().wait()  # for ever
                sink.sendall(chunk)
                self.passed += len(chunk)
                if self.rate < float("inf"):
                    time.sleep(len(chunk) / self.rate)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
