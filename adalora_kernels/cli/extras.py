"""Optional dependencies, asked for before any work is done."""

from __future__ import annotations

from importlib.util import find_spec


def require_extra(command: str, extra: str, modules: tuple[str, ...]) -> None:
    """Hold that the modules of an extra are installed.

    Raises:
        SystemExit: one is missing; the message names it, the extra, and how to install it.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise SystemExit(
            f"adalora-kernels {command} needs {' and '.join(missing)}, of the extra {extra!r}: "
            f"pip install 'adalora-kernels[{extra}]'"
        )


__all__ = ["require_extra"]
