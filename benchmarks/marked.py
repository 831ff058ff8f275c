"""Parts of a text that are made from records and stand between marks."""

from __future__ import annotations


def exchanged(text: str, begin: str, end: str, made: str) -> str:
    """``text`` with ``made`` between its marks.

    Raises:
        ValueError: a mark is missing.
    """
    head, _, rest = text.partition(begin)
    _, mark, tail = rest.partition(end)
    if not mark:
        raise ValueError(f"README.md: expected the marks {begin} and {end}")
    return f"{head}{begin}\n{made}\n{end}{tail}"


__all__ = ["exchanged"]
