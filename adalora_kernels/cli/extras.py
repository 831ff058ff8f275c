"""Optional dependencies, asked for before any work is done."""

from __future__ import annotations

import logging
from importlib.util import find_spec

_TALKATIVE = ("torchao", "bitsandbytes", "DeepSpeed", "torch.utils._pytree")


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


def quiet_optional_packages() -> None:
    """Keep what PEFT and transformers import beside themselves from talking into a command's output, but for errors."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


__all__ = ["quiet_optional_packages", "require_extra"]
