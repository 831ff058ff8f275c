"""``ranks`` and ``export`` on saved adapters, and what they say of folders that aren't any."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from peft import PeftModel
from transformers import DebertaV2ForSequenceClassification, logging

from adalora_kernels.cli.main import main
from tests.integrations.small_models import batch, build, train


class Saved:
    """A trained adapter, its base, and what the two give."""

    def __init__(self, folder: Path) -> None:
        self.base, self.bare, self.adapter = folder / "base", folder / "bare", folder / "adapter"
        model = build("deberta", target_r=2)
        untrained = build("deberta", target_r=2).unload()
        untrained.save_pretrained(self.base)
        untrained.deberta.save_pretrained(self.bare)  # as pretrained models come: without pooler and classifier
        train(model, 20)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no vocabulary to compare with
            model.save_pretrained(self.adapter)
        self.ranks = [int(p.count_nonzero()) for name, p in model.named_parameters() if "lora_E" in name]
        self.inputs = batch(model)
        self.logits = self._logits(model)

    def _logits(self, model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model.eval()(**self.inputs).logits
        return logits

    def gives(self, model: torch.nn.Module) -> None:
        torch.testing.assert_close(self._logits(model), self.logits, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def damaged(saved: Saved, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved.adapter, tmp_path / "damaged"))


def test_ranks_draws_and_tables_the_budget(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ranks", str(saved.adapter), "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    lines = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line and line[0].isalpha()}
    live, count = sum(saved.ranks), len(saved.ranks)
    parameters = sum(
        v.numel() for name, v in load_file(saved.adapter / "adapter_model.safetensors").items() if "lora" in name
    )
    assert lines["total"] == [
        str(count),
        str(live),
        str(6 * count),
        f"{100 * live / 6 / count:.1f}",
        "%",
        f"{parameters:,}",
    ]
    assert lines["target"][0] == str(2 * count)
    assert lines["attention.self.key_proj"][0] == "2"


def test_ranks_says_when_the_target_is_not_reached(
    saved: Saved, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = damaged / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_r": 1}))
    assert main(["ranks", str(damaged), "--output", str(tmp_path / "new" / "picture.png")]) == 0
    assert f"{sum(saved.ranks) - len(saved.ranks)} more than the target" in capsys.readouterr().out
    tensors = load_file(damaged / "adapter_model.safetensors")
    untrained = {name: v * 0 if name.endswith("lora_E") else v for name, v in tensors.items()}
    save_file(untrained, damaged / "adapter_model.safetensors")
    assert main(["ranks", str(damaged), "--output", str(tmp_path)]) == 0
    assert "the adapter is untrained" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--uniform-rank"]])
def test_export_needs_no_base(
    saved: Saved, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(saved.adapter), "--output", str(tmp_path / "lora"), *arguments]) == 0
    live = [rank for rank in saved.ranks if rank]
    assert f"LoRA of {len(live)} of {len(saved.ranks)} layers, rank {max(live)} at most" in capsys.readouterr().out
    base = DebertaV2ForSequenceClassification.from_pretrained(saved.base)
    saved.gives(PeftModel.from_pretrained(base, tmp_path / "lora"))


def test_merged_export_takes_the_head_from_the_adapter(saved: Saved, tmp_path: Path) -> None:
    arguments = ["export", str(saved.adapter), "--output", str(tmp_path / "all"), "--merged", "--base"]
    # Nobody has saved this pooler: PEFT does so only where modules_to_save names it.
    with pytest.raises(SystemExit, match=r"neither has pooler\.dense\.bias"):
        main([*arguments, str(saved.bare)])
    assert not (tmp_path / "all").exists()
    assert main([*arguments, str(saved.base)]) == 0
    saved.gives(DebertaV2ForSequenceClassification.from_pretrained(tmp_path / "all"))


@pytest.mark.parametrize("command", ["ranks", "export"])
def test_folders_that_are_no_checkpoint_end_in_one_line(
    saved: Saved, damaged: Path, tmp_path: Path, command: str
) -> None:
    def message(folder: Path, *arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([command, str(folder), "--output", str(tmp_path / "never"), *arguments])
        text = str(stopped.value)
        assert (
            text.startswith(f"adalora-kernels {command}: ") and "\n" not in text and stopped.value.__suppress_context__
        )
        return text

    assert "did you mean" in message(damaged.parent) and str(damaged) in message(damaged.parent)
    assert "give the folder that save_pretrained() wrote" in message(tmp_path / "nowhere")
    tensors = damaged / "adapter_model.safetensors"
    whole = tensors.read_bytes()
    for broken in (whole[:300], b"", whole[:-100], whole[:8] + b"\xff" * 40 + whole[48:]):
        tensors.write_bytes(broken)
        assert "a damaged file" in message(damaged) and "save it again" in message(damaged)
    tensors.unlink()
    assert "expected adapter_model.safetensors beside adapter_config.json" in message(damaged)
    (damaged / "adapter_model.bin").write_bytes(b"not a pickle")
    assert "a damaged file" in message(damaged)
    for content in ([1, 2], {"lora_A": 1}):
        torch.save(content, damaged / "adapter_model.bin")
        assert "it holds something else" in message(damaged)
    config = damaged / "adapter_config.json"
    settings = json.loads(config.read_text())
    for value, expected in (
        ({**settings, "peft_type": "LORA"}, "peft_type ADALORA, got LORA"),
        ({**settings, "init_r": None}, "expected init_r to be a rank of at least 1, got None"),
        ({**settings, "lora_alpha": None}, "expected lora_alpha to be a finite number, got None"),
        ({**settings, "init_r": True}, "expected init_r to be a rank of at least 1, got True"),
        ({**settings, "modules_to_save": 3}, "expected modules_to_save to be null or list[str], got 3"),
        ({**settings, "modules_to_save": ["a", 3]}, "expected modules_to_save to be null or list[str], got ['a', 3]"),
        ({**settings, "task_type": ["SEQ_CLS"]}, "expected task_type to be null or str, got ['SEQ_CLS']"),
        ({**settings, "auto_mapping": 3}, "expected auto_mapping to be null or dict, got 3"),
        ({**settings, "lora_dropout": "0.1"}, "expected lora_dropout to be null or float, got '0.1'"),
        ({**settings, "lora_dropout": 5}, "expected lora_dropout in [0, 1], got 5"),
        ({**settings, "bias": "some"}, "expected bias to be null or Literal['none', 'all', 'lora_only'], got 'some'"),
        ({**settings, "trainable_token_indices": {"a": [1, "b"]}}, "null or list[int] | dict[str, list[int]], got {'a"),
        ([settings], "peft_type ADALORA, got None"),
    ):
        config.write_text(json.dumps(value))
        assert expected in message(damaged)
    config.write_text('{"peft_type"')
    assert "expected JSON, got a damaged file" in message(damaged)
    assert not (tmp_path / "never").exists()


def test_tensors_that_do_not_belong_together(damaged: Path, tmp_path: Path) -> None:
    path = damaged / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name, v in tensors.items() if name.endswith("lora_A") and len(v) > 1)
    for change, expected in (
        ({}, "lora_A is missing"),
        ({name: tensors[name][:1]}, r"expected A \[R, K\]"),
        ({name: tensors[name] * float("nan")}, "expected finite numbers"),
        ({name: tensors[name].to(torch.float8_e4m3fn)}, "expected 16, 32 or 64-bit numbers"),
    ):
        save_file({**{key: v for key, v in tensors.items() if key != name}, **change}, path)
        with pytest.raises(SystemExit, match=expected):
            main(["ranks", str(damaged), "--output", str(tmp_path)])
    save_file(tensors, path)
    config = damaged / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "init_r": 1, "target_r": 1}))
    with pytest.raises(SystemExit, match=r"expected at most init_r = 1 rows, .* copy config and tensors of one"):
        main(["ranks", str(damaged), "--output", str(tmp_path)])
    config.write_text(json.dumps(settings))
    save_file({key: v for key, v in tensors.items() if "lora" not in key}, path)
    with pytest.raises(SystemExit, match="found none"):
        main(["ranks", str(damaged), "--output", str(tmp_path)])


@pytest.mark.parametrize("command", [["ranks"], ["export"], ["demo"]])
def test_output_that_cannot_be_made(saved: Saved, tmp_path: Path, command: list[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    checkpoint = [] if command == ["demo"] else [str(saved.adapter)]
    below = str(file) if command != ["ranks"] else str(file / "ranks.png")
    with pytest.raises(SystemExit, match=r"--output: expected a folder, .* is a file or lies below one"):
        main([*command, *checkpoint, "--output", below])


def test_wrong_ways_to_export(saved: Saved, tmp_path: Path) -> None:
    arguments = ["export", str(saved.adapter), "--output", str(tmp_path / "never")]
    other = tmp_path / "llama"
    build("llama").unload().save_pretrained(other)
    for more, expected in (
        (["--base", "x"], "--base: expected it with --merged alone"),
        (["--merged"], "the adapter's config names none; give it with --base"),
        (["--merged", "--base", str(tmp_path)], "expected the model that the adapter was trained on"),
        (["--merged", "--base", str(other)], "is not in LlamaForSequenceClassification|neither has"),
        (
            ["--merged", "--base", str(saved.adapter)],
            "expected the model below the adapter, .* holds an adapter itself",
        ),
    ):
        with pytest.raises(SystemExit, match=expected):
            main([*arguments, *more])
    with pytest.raises(SystemExit, match="expected a folder without another method's adapter"):
        main(["export", str(saved.adapter), "--output", str(saved.adapter)])
    assert not (tmp_path / "never").exists()


def test_a_class_that_transformers_does_not_have(saved: Saved, damaged: Path, tmp_path: Path) -> None:
    config = damaged / "adapter_config.json"
    settings = {**json.loads(config.read_text()), "task_type": None}
    for library in ("transformers", "transformers.nothing", "os"):
        mapping = {"base_model_class": "path", "parent_library": library}
        config.write_text(json.dumps({**settings, "auto_mapping": mapping}))
        with pytest.raises(SystemExit, match="adapter: expected a task_type or a class of transformers, got path"):
            main(["export", str(damaged), "--output", str(tmp_path / "never"), "--merged", "--base", str(saved.base)])
    assert not (tmp_path / "never").exists()


def test_ranks_needs_matplotlib_alone(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    for name in [name for name in sys.modules if name.startswith("adalora_kernels.cli.ranks")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["ranks", str(saved.adapter), "--output", str(tmp_path)]) == 0


@pytest.fixture(autouse=True)
def quiet() -> None:
    """No progress bars and reports of transformers among the test's lines."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
