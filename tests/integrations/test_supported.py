"""Who has no PEFT, an old one or one that can't be imported is told so, with the cure."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from adalora_kernels.integrations import supported


def test_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(supported, "version", nothing)
    with pytest.raises(ImportError, match=r"needs Hugging Face PEFT: pip install 'adalora-kernels\[peft\]'"):
        raise supported.why_not_peft(ModuleNotFoundError("No module named 'peft'"))


def test_too_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supported, "version", lambda _: "9.0")
    with pytest.raises(ImportError, match=r"peft 9.0 lacks .* no 'SVDLinear'.*pip install --upgrade adalora-kernels"):
        raise supported.why_not_peft(ImportError("there is no 'SVDLinear'"))


@pytest.mark.parametrize("importable", [True, False])
def test_too_old(importable: bool, tmp_path: Path) -> None:
    """PEFT 0.17 can't be imported with transformers 5; that is not the error that its user should get."""
    body = "__version__ = '0.17.1'" if importable else "from transformers import HybridCacheThatIsGone"
    for name, text in {
        "peft/__init__.py": body,
        "peft/tuners/__init__.py": "",
        "peft/tuners/adalora/__init__.py": "",
        "peft/tuners/adalora/layer.py": "class AdaLoraLayer: pass",
        "peft/tuners/adalora/model.py": "class AdaLoraModel: pass",
        "peft-0.17.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: peft\nVersion: 0.17.1\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-c", "import adalora_kernels; adalora_kernels.patch_peft()"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last == "ImportError: expected peft >= 0.18.0, found 0.17.1: pip install 'peft>=0.18.0'"
