"""Work in a process of its own: a crash, a hang or a broken CUDA context costs that process and the work at hand."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

LAST_LINES = 12  # of a traceback, kept
_GRACE = 5.0


class Failed(Exception):
    """The work raised, took too long, or ended its process.

    Attributes:
        trace: the end of the traceback, where there is one.
    """

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


class Here:
    """As ``Apart``, in this process, where nothing but an exception can be caught."""

    def run(self, function: Callable[..., Any], *args: Any, seconds: float) -> Any:
        """As ``Apart``'s; nothing is cut short."""
        try:
            return function(*args)
        except Exception as error:
            raise Failed(message_of(error), tail(error)) from error

    def close(self) -> None:
        """As ``Apart``'s."""


class Apart:
    """A process that runs one function after the other. It is started when there is work, and after a failure anew."""

    def __init__(self) -> None:
        self._process: Any = None
        self._pipe: Connection | None = None
        self._busy = False

    def run(self, function: Callable[..., Any], *args: Any, seconds: float) -> Any:
        """What the function returns; it, its arguments and its result are pickled.

        Raises:
            Failed: it raised, has not returned after so many seconds, or ended the process.
        """
        if self._pipe is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,))  # which may have children, as inductor has
            self._process.start()
            theirs.close()
        self._busy = True
        try:
            self._pipe.send((function, args))
            if not self._pipe.poll(seconds):
                self.close()
                raise Failed(f"no answer within {seconds:.0f} s: its process was ended")
            fine, answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            self.close()
            raise Failed(f"its process ended: {signal.Signals(-code).name if code < 0 else f'exit {code}'}") from None
        self._busy = False
        if not fine:
            self.close()  # what it left behind on the device is anybody's guess
            raise Failed(*answer)
        return answer

    def close(self) -> None:
        """End the process: it has a moment to do so itself, as one does that waits for work."""
        if self._pipe is not None:
            self._pipe.close()
            self._process.join(0 if self._busy else _GRACE)
            self._process.kill()
            self._process.join()
            self._pipe = self._process = None

    def __enter__(self) -> Apart:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _serve(pipe: Connection) -> None:
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(*args))
        except Exception as error:
            answer = (False, (message_of(error), tail(error)))
        pipe.send(answer)


def message_of(error: BaseException) -> str:
    """An error in a line; an assertion's is what it says, or where it stands."""
    said = str(error)[:2000]
    if not said and error.__traceback__ is not None:
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{where.line} ({Path(where.filename).name}:{where.lineno})"
    return said if isinstance(error, AssertionError) and said else f"{type(error).__name__}: {said}"


def tail(error: BaseException) -> str:
    """The end of its traceback."""
    return "\n".join("".join(traceback.format_exception(error)).splitlines()[-LAST_LINES:])[-4000:]


__all__ = ["Apart", "Failed", "Here", "message_of", "tail"]
