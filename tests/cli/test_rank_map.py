"""The heat map: what is a kind and what is a layer, in text of any width and as a picture."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from adalora_kernels.cli.rank_map import RankMap, as_text, draw, kinds_of, rank_map


@pytest.mark.parametrize(
    ("path", "others", "kind", "layer"),
    [
        ("bert.encoder.layer.3.output.dense", ["bert.encoder.layer.0.query"], "output.dense", "3"),
        ("bert.encoder.layer.3.output.dense", ["pooler.dense"], "output.dense", "3"),
        ("pooler.dense", ["bert.encoder.layer.3.output.dense"], "pooler.dense", "-"),
        ("decoder.block.1.layer.0.q", ["encoder.block.1.layer.0.q"], "decoder.layer.0.q", "1"),
        ("model.a.layers.7.q", ["model.b.layers.7.q"], "a.q", "7"),
        ("0.first", ["1.first"], "first", "0"),
        ("first", [], "first", "-"),
    ],
)
def test_kind_and_layer(path: str, others: list[str], kind: str, layer: str) -> None:
    assert kinds_of([path, *others])[path] == (kind, layer)


def example(layers: int) -> RankMap:
    ranks = {f"h.{i}.{kind}": (i + j) % 9 for i in range(layers) for j, kind in enumerate(("attn", "mlp"))}
    return rank_map("here", {"score": 5, **ranks, "h.1.extra": 8}, 8)


def test_columns_are_in_the_layers_order_and_nothing_is_lost() -> None:
    ranks = example(12)
    assert list(ranks.columns) == [*map(str, range(12)), "-"]
    assert list(ranks.rows) == ["score", "attn", "mlp", "extra"]
    assert ranks.total == 5 + 8 + sum((i + j) % 9 for i in range(12) for j in (0, 1))


@pytest.mark.parametrize("width", [30, 60, 80, 500])
def test_text_fits_and_holds_every_rank(width: int) -> None:
    ranks = example(12)
    lines = as_text(ranks, width).splitlines()
    assert max(map(len, lines[1:])) <= width
    shown = [
        int(word.lstrip("░▒▓█"))
        for line in lines[1:]
        if line[0] != " "
        for word in line.split()[1:]
        if word[-1].isdigit()
    ]
    assert sum(shown) == ranks.total and len(shown) == len(ranks.ranks)


def test_shades_follow_the_share() -> None:
    ranks = RankMap("x", ["a"], ["0", "1", "2", "3"], {("a", str(i)): rank for i, rank in enumerate((0, 1, 5, 8))}, 8)
    assert as_text(ranks, 200).splitlines()[2].split() == ["a", "0", "░░░░", "1", "▓▓▓▓", "5", "████", "8"]


def test_picture_grows_with_the_model(tmp_path: Path) -> None:
    sizes = []
    for layers in (2, 40):
        path = tmp_path / f"{layers}.any"
        draw([example(layers)], "heading", path)
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        sizes.append(int.from_bytes(data[16:20], "big"))
    assert sizes[1] > 2 * sizes[0]
