"""The corpus: what is read, and that its parts share nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from adalora_kernels.cli.demo.text import Pair, first_sentence, read_corpus, split_corpus, split_name

SOURCE = '''
"""A module."""
import antigravity_would_be_opened

class HTTPServer(BaseServer, metaclass=Meta):
    """Serves requests until told to stop."""

    def handle_request(self, maxSize, *args, timeout=None, **kw):
        """Handle one request.

        At once.
        """
        def inner(x):
            """Do what the inner does."""

    def silent(self): pass

if True:
    async def read_utf8(path, /):
        """Read all of a file,
        decoded. Then close it."""

def short():
    """Too short."""
def again():
    """Handle one request."""
'''


@pytest.fixture(scope="module")
def corpus() -> list[Pair]:
    return read_corpus()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("HTTPServer.handle_request", "http server handle request"),
        ("getURLFromCache", "get url from cache"),
        ("__init__", "init"),
        ("read_utf8", "read utf 8"),
        ("_", ""),
    ],
)
def test_names_are_cut_at_case_and_underscore(name: str, words: str) -> None:
    assert split_name(name) == words


def test_first_sentence() -> None:
    assert first_sentence("  Read all of\n  a file.  Then close.\n\nMore.") == "Read all of a file."
    assert first_sentence("No full stop\n\nNext paragraph.") == "No full stop"


def test_definitions_are_read_without_being_imported(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "__init__.py").write_text(SOURCE)
    (tmp_path / "server" / "tests").mkdir()
    (tmp_path / "server" / "tests" / "cases.py").write_text(SOURCE.replace("one request", "another request"))
    (tmp_path / "not-a-module.py").write_text("this does not parse")
    pairs = read_corpus(tmp_path)
    assert [(p.package, p.module) for p in pairs] == [("server", "server")] * 4
    assert [(p.signature, p.summary) for p in pairs] == [
        ("http server ( base server )", "Serves requests until told to stop."),
        ("http server handle request ( max size , args , timeout , kw )", "Handle one request."),
        ("http server handle request inner ( x )", "Do what the inner does."),
        ("read utf 8 ( path )", "Read all of a file, decoded."),
    ]


def test_no_sources_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no documented Python sources"):
        read_corpus(tmp_path)


def test_standard_library_is_enough(corpus: list[Pair]) -> None:
    assert len(corpus) > 2500
    assert len({pair.summary for pair in corpus}) == len(corpus)
    assert not any({"test", "tests", "site-packages"} & set(pair.module.split(".")) for pair in corpus)


def test_parts_share_nothing(corpus: list[Pair]) -> None:
    splits = split_corpus(corpus)
    parts = vars(splits)
    assert sum(map(len, parts.values())) == len(corpus)
    adapted = {name: part for name, part in parts.items() if name != "base"}
    base_packages = {pair.package for pair in splits.base}
    for part in adapted.values():
        assert base_packages.isdisjoint(pair.package for pair in part)
    modules = [{pair.module for pair in part} for part in adapted.values()]
    assert sum(map(len, modules)) == len(set().union(*modules))
    assert 0.4 < len(splits.base) / len(corpus) < 0.6
    rest = len(corpus) - len(splits.base)
    for part, share in ((splits.train, 0.55), (splits.calibration, 0.15), (splits.held_out, 0.3)):
        assert abs(len(part) / rest - share) < 0.1


def test_corpus_and_tokenizer_are_the_same_in_every_process() -> None:
    code = """
import hashlib, sysconfig
from pathlib import Path
from adalora_kernels.cli.demo.model import texts_of, train_tokenizer
from adalora_kernels.cli.demo.text import read_corpus, split_corpus
splits = split_corpus(read_corpus(Path(sysconfig.get_path("stdlib")) / "asyncio"))
tokenizer = train_tokenizer(sum(texts_of(splits.base + splits.train), []), 500, 16)
digest = hashlib.sha256((repr(splits) + tokenizer.to_str()).encode()).hexdigest()
"""
    here: dict[str, str] = {}
    exec(code, here)
    there = subprocess.run([sys.executable, "-c", code + "print(digest)"], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here["digest"]
