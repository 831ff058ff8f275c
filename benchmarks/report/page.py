"""The page and its plots, written from a folder of records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import jinja2

from benchmarks.report import engine, layers, speedups, steps, verdicts
from benchmarks.report.draw import WIDTH
from benchmarks.report.figures import Section
from benchmarks.report.sources import Source, read_folder

_HERE = Path(__file__).parent


def write(results: Path, output: Path) -> Path:
    """Write ``index.html``, which holds everything it shows, and each plot as a PNG below ``plots/``.

    Args:
        results: a folder of records.
        output: a folder, made where it isn't there.

    Returns:
        The page.

    Raises:
        ValueError: ``results`` holds no records, or ``output`` is a file.
    """
    sources, left_out = read_folder(results)
    sections = [section for section in _sections(sources) if section.figures]
    plots = output / "plots"
    try:
        plots.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"--output: expected a folder, {output} is a file or lies below one; name another") from None
    for stale in plots.glob("*.png"):
        stale.unlink()
    named: Counter[str] = Counter()
    for figure in (figure for section in sections for figure in section.figures):
        named[figure.stem] += 1
        again = f"-{named[figure.stem]}" if named[figure.stem] > 1 else ""
        (plots / f"{figure.stem}{again}.png").write_bytes(figure.plot.png)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = output / "index.html"
    text = environment.get_template("page.html").render(
        css=(_HERE / "page.css").read_text(encoding="utf-8"),
        width=WIDTH,
        sources=sources,
        left_out=left_out,
        absent={name: why for source in sources for name, why in source.content.get("absent", {}).items()},
        verdicts={"On a CPU": list(verdicts.on_cpu(sources)), "On a GPU": list(verdicts.on_gpu(sources))},
        dry=any(origin.dry for source in sources for origin in source.origins),
        sections=sections,
    )
    page.write_text(text, encoding="utf-8")
    return page


def _sections(sources: list[Source]) -> Iterator[Section]:
    return chain(
        speedups.sections(sources),
        layers.sections(sources),
        engine.sections(sources),
        steps.sections(sources),
        speedups.others(sources),
    )


__all__ = ["write"]
