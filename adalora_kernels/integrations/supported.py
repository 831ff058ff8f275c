"""Which PEFT the integrations work with, and what to tell who has another."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

MINIMUM_PEFT = "0.18.0"


def why_not_peft(error: ImportError | None = None) -> ImportError:
    """What to raise where PEFT can't be used, with the cure.

    Args:
        error: what importing PEFT or a part of it raised; None where it could be imported, but is too old.
    """
    try:
        found = version("peft")
    except PackageNotFoundError:
        return ImportError("this needs Hugging Face PEFT: pip install 'adalora-kernels[peft]'")
    if error is None or Version(found) < Version(MINIMUM_PEFT):
        return ImportError(f"expected peft >= {MINIMUM_PEFT}, found {found}: pip install 'peft>={MINIMUM_PEFT}'")
    return ImportError(
        f"peft {found} lacks something here: {error}. If it misses a package, install that; if it is newer than this "
        "release, pip install --upgrade adalora-kernels"
    )


__all__ = ["MINIMUM_PEFT", "why_not_peft"]
