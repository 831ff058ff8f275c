"""A headless Chromium, driven over its debugging pipe: a page as a reader's browser shows it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import tempfile
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
# As root and in containers there is no sandbox to be had, and little shared memory.
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--disable-sync",
    "--remote-debugging-pipe",
)  # fmt: skip


def found() -> str | None:
    """The program; None where none is installed."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Page:
    """One page of a browser.

    Attributes:
        events: what has been reported, in order, by method and parameters.
    """

    def __init__(self, into: int, out_of: int) -> None:
        self._into, self._out_of = os.fdopen(into, "wb", buffering=0), os.fdopen(out_of, "rb")
        self._rest, self._number = b"", 0
        self._session: str | None = None
        self.events: list[tuple[str, dict[str, Any]]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask, and wait for the answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._into.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, path: Path, width: int, height: int, dark: bool = False) -> None:
        """Show a file at a size in pixels, and wait until it has loaded."""
        self.events.clear()
        mobile = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            self._read()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def picture(self, whole: bool = True) -> bytes:
        """A PNG of the page."""
        return b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def reported(self, *methods: str) -> list[dict[str, Any]]:
        """The parameters of events so far."""
        return [parameters for method, parameters in self.events if method in methods]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._out_of.fileno(), 1 << 16)
            assert more, "Chromium has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        if "method" in answer:
            self.events.append((answer["method"], answer.get("params", {})))
        return answer


@contextmanager
def browser(program: str) -> Iterator[Page]:
    """A running browser with one page, ended afterwards."""
    (read_by_it, into), (out_of, written_by_it) = os.pipe(), os.pipe()
    # Chromium reads file descriptor 3 and writes 4: what is put there must lie elsewhere.
    given = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (read_by_it, written_by_it)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        nothing = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
        pipes = [(os.POSIX_SPAWN_DUP2, fd, at) for at, fd in zip((3, 4), given, strict=True)]
        arguments = [program, *OPTIONS, f"--user-data-dir={profile}"]
        process = os.posix_spawn(program, arguments, os.environ, file_actions=[*nothing, *pipes])
        for fd in (read_by_it, written_by_it, *given):
            os.close(fd)
        try:
            yield Page(into, out_of)
        finally:
            os.kill(process, signal.SIGTERM)
            os.waitpid(process, 0)


__all__ = ["Page", "browser", "found"]
