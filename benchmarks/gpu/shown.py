"""A record in a line."""

from __future__ import annotations

from typing import Any


def shown(record: dict[str, Any]) -> str:
    """What was measured on what, and what came; then who was withheld or refused, and why."""
    about = " ".join(f"{key}={value}" for key, value in record.get("case", {}).items())
    head = f"{record['benchmark']} {record.get('direction', '')} {about}".strip()
    left = (f"    not {name}: {why}" for field in _LEFT for name, why in record.get(field, {}).items())
    return "\n".join([f"{head}: {', '.join(_figures(record))}", *left])


_LEFT = ("withheld", "not_captured", "not_compiled")


def _figures(record: dict[str, Any]) -> list[str]:
    if "ratio_to_frozen" in record:
        frozen = f"frozen {record['microseconds']['frozen']['median']:.1f} µs"
        return [frozen, *(f"{name} {ratio:.3f}" for name, ratio in record["ratio_to_frozen"].items())]
    units = {"milliseconds": "ms", "microseconds": "µs"}
    times = [f"{n} {t['median']:.1f} {said}" for unit, said in units.items() for n, t in record.get(unit, {}).items()]
    counts = [f"{name} {count}" for name, count in record.get("launches", {}).items()]
    return times + counts or [f"{key} {value:.4g}" for key, value in record.items() if isinstance(value, float)]


__all__ = ["shown"]
