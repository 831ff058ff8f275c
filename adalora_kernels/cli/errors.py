"""What a user has given wrong ends a command with one line and no traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def plain_errors(command: str) -> Iterator[None]:
    """Turn the errors of what is done inside into the command's last line.

    Raises:
        SystemExit: for a ValueError or an OSError; status 1, with the first line of its message.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise SystemExit(f"adalora-kernels {command}: {str(error).splitlines()[0]}") from None


def make_folder(path: Path) -> None:
    """Make the folder of ``--output``.

    Raises:
        ValueError: it, or what it lies in, is a file or can't be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"--output: expected a folder, {path} is a file or lies below one; name another") from None
    except OSError as error:
        raise ValueError(
            f"--output: expected a folder that can be made, {path}: {error.strerror}; name another"
        ) from None


__all__ = ["make_folder", "plain_errors"]
