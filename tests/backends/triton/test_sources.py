"""A kernel's fingerprint changes with its code and that of what it calls, and with nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from adalora_kernels.backends.triton import configurations, sources


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the kernels, which is what is read."""
    copied = tmp_path / "triton"
    shutil.copytree(sources._FOLDER, copied, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(sources, "_FOLDER", copied)
    forget()
    yield copied
    monkeypatch.undo()
    forget()


def forget() -> None:
    for function in (sources.fingerprint, sources.fingerprint_of_all, sources._functions):
        function.cache_clear()


def changed(path: Path, before: str, after: str) -> set[str]:
    """The kernels whose fingerprints are others when a file is edited."""
    text = path.read_text(encoding="utf-8")
    assert before in text
    names = {c.kernel for c in configurations.configurations()} - {"finish", "sum_v"}
    first = {name: sources.fingerprint(name) for name in names}
    path.write_text(text.replace(before, after, 1), encoding="utf-8")
    forget()
    return {name for name in names if sources.fingerprint(name) != first[name]}


def test_own_code(folder: Path) -> None:
    assert changed(folder / "forward" / "one_pass.py", "tl.program_id(0)", "tl.program_id(1)") == {"one_pass"}


def test_what_it_calls(folder: Path) -> None:
    found = changed(folder / "tickets.py", "GROUP_M)\n", "GROUP_M * 2)\n")
    assert found == {"gemm", "one_gemm", "dx"}


def test_layout_comments_and_docstrings_do_not_count(folder: Path) -> None:
    path = folder / "tickets.py"
    assert not changed(path, '    """The next ticket;', '    # a remark\n    """Another text;')
    assert not changed(
        path, "def take_ticket(workspace_ptr, tickets):", "def take_ticket(\n    workspace_ptr,\n    tickets\n):"
    )
    assert not changed(folder / "plans.py", "def parse(", "def  parse(")


def test_an_indent_counts(folder: Path) -> None:
    before = '        tl.atomic_xchg(workspace_ptr, 0, sem="relaxed")\n    return ticket'
    after = '        pass\n    tl.atomic_xchg(workspace_ptr, 0, sem="relaxed")\n    return ticket'
    assert "gemm" in changed(folder / "tickets.py", before, after)


def test_every_kernel_has_one() -> None:
    with pytest.raises(KeyError):
        sources.fingerprint("none")
    assert len(sources.fingerprint_of_all()) == 12
