"""What stands on the page: figures with their tables and origins, in sections."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.report.draw import Plot
from benchmarks.report.sources import Measured, Origin


@dataclass(frozen=True)
class Table:
    """Rows under a head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A plot.

    Attributes:
        title: what it shows, and on what.
        plot: the picture.
        table: its figures, exactly.
        measured: the records that it is made from.
        note: a sentence about it.
    """

    title: str
    plot: Plot
    table: Table
    measured: Sequence[Measured]
    note: str = ""

    @property
    def origins(self) -> list[Origin]:
        """Where its figures come from, each once."""
        return [m.origin for i, m in enumerate(self.measured) if m.origin not in [o.origin for o in self.measured[:i]]]

    @property
    def alternative(self) -> str:
        """What it says, for those who don't see it."""
        rows = "; ".join(
            ", ".join(f"{h} {c}" for h, c in zip(self.table.head, row, strict=True)) for row in self.table.rows
        )
        return f"{self.title}. {rows}."

    @property
    def stem(self) -> str:
        """The name of its PNG, less the ending."""
        stem = "-".join(dict.fromkeys(origin.file.removesuffix(".json") for origin in self.origins))
        return re.sub(r"[^a-z0-9]+", "-", f"{stem} {self.title}".lower()).strip("-")

    @property
    def address(self) -> str:
        """The picture in a data URI."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.plot.svg.encode()).decode()


@dataclass(frozen=True)
class Section:
    """Figures of one subject."""

    title: str
    about: str
    figures: Sequence[Figure]


__all__ = ["Figure", "Section", "Table"]
