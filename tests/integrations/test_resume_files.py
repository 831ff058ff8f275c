"""The training state beside a checkpoint: other loops, ranks that have changed meanwhile, and files that don't fit."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from adalora_kernels import RankAllocator, SVDLinear, load_training_state, save_training_state
from adalora_kernels.integrations.checkpoint import STATE_FILE
from adalora_kernels.integrations.peft import patch_model, unpatch_model
from tests.integrations.small_models import adapter_parameters, batch, build

STOP, TOTAL, END = 8, 20, 16  # of small_models' schedule


def fresh(seed: int = 0, **settings: Any) -> PeftModel:
    model = patch_model(build("perceptron", seed=seed, **settings))
    if seed:  # the base is pretrained
        base = build("perceptron").state_dict()
        model.load_state_dict({name: value for name, value in base.items() if "lora_" not in name}, strict=False)
    return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2)


def advance(model: PeftModel, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model.base_model(**batch(model, seed=step)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)


def save(model: PeftModel, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    save_training_state(model, folder)


def everything(model: PeftModel) -> dict[str, Any]:
    importance = model.base_model.rank_allocator().state_dict()
    held = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = model.peft_config[model.active_adapter]
    pattern = None if config.rank_pattern is None else list(config.rank_pattern.values())
    return {**held, **importance, "pattern": pattern}


def assert_same(left: dict[str, Any], right: dict[str, Any], *, but: tuple[str, ...] = ()) -> None:
    assert left.keys() == right.keys()
    for name in left.keys() - set(but):
        a, b = left[name], right[name]
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved while pruning."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    torch.manual_seed(0)
    model = fresh()
    optimizer = adamw(model)
    advance(model, optimizer, range(STOP))
    save(model, optimizer, folder)
    return folder


def whole(stop: int = TOTAL) -> dict[str, Any]:
    model = fresh()
    advance(model, adamw(model), range(stop))
    return everything(model)


@pytest.mark.parametrize("how", ["load_adapter", "load_training_state", "sliced by PEFT", "trained on meanwhile"])
def test_a_loop_of_ones_own(how: str, checkpoint: Path) -> None:
    if how == "sliced by PEFT":
        model = PeftModel.from_pretrained(build("perceptron").unload(), checkpoint, is_trainable=True).train()
        assert any(p.shape[0] < 6 for name, p in adapter_parameters(model).items() if "lora_E" in name)
        patch_model(model)
    else:
        model = fresh(seed=5)
    optimizer = adamw(model)
    if how == "trained on meanwhile":
        advance(model, optimizer, range(STOP, END + 2))
    if how == "load_training_state":
        load_training_state(model, checkpoint)
    else:
        model.load_adapter(checkpoint, "default", is_trainable=True)
    assert_same(everything(model), whole(STOP))
    optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt"))
    advance(model, optimizer, range(STOP, TOTAL))
    assert_same(everything(model), whole())


def test_under_another_name_and_among_other_files(checkpoint: Path, tmp_path: Path) -> None:
    """PEFT puts an adapter that isn't called "default" into a folder of its own."""
    model = fresh(adapter="a")
    optimizer = adamw(model)
    advance(model, optimizer, range(STOP))
    save(model, optimizer, tmp_path)
    assert (tmp_path / "a" / STATE_FILE).is_file() and not (tmp_path / STATE_FILE).exists()
    for folder, load in ((tmp_path / "a", "adapter"), (tmp_path, "state")):
        again = fresh(seed=5, adapter="a")
        if load == "adapter":
            again.load_adapter(folder, "a", is_trainable=True)
        else:
            load_training_state(again, folder)
        assert_same(everything(again), everything(model))


@pytest.mark.parametrize("cast", [False, True], ids=["as it was", "asked for"])
def test_a_bfloat16_adapter_stays_one(cast: bool, tmp_path: Path) -> None:
    """PEFT's ``load_adapter`` casts to fp32, also what has trained in 16 bits."""
    settings = {"dtype": torch.bfloat16, "autocast_adapter_dtype": False}
    model = patch_model(build("perceptron", **settings))
    optimizer = adamw(model)
    advance(model, optimizer, range(STOP))
    save(model, optimizer, tmp_path)
    again = patch_model(build("perceptron", **settings))
    again.load_adapter(tmp_path, "default", is_trainable=True, **({"autocast_adapter_dtype": True} if cast else {}))
    assert {p.dtype for p in adapter_parameters(again).values()} == {torch.float32 if cast else torch.bfloat16}
    if cast:
        return
    resumed = adamw(again)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    advance(model, optimizer, range(STOP, TOTAL))
    advance(again, resumed, range(STOP, TOTAL))
    assert_same(everything(again), everything(model))


def test_a_model_that_was_pickled_patched(checkpoint: Path, tmp_path: Path) -> None:
    """Into a process where nothing is patched."""
    (tmp_path / "model").write_bytes(pickle.dumps(fresh(seed=5)))
    script = (
        "import pickle, sys; model = pickle.load(open(sys.argv[1], 'rb')); "
        "model.load_adapter(sys.argv[2], 'default', is_trainable=True); "
        "assert model.base_model.rank_allocator().next_step == int(sys.argv[3])"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "model"), str(checkpoint), str(STOP)]
    subprocess.run(command, check=True, capture_output=True)


def test_after_compact(tmp_path: Path) -> None:
    model = fresh()
    optimizer = adamw(model)
    advance(model, optimizer, range(END + 1))
    model.base_model.rank_allocator().compact(optimizer)
    advance(model, optimizer, range(END + 1, END + 2))
    save(model, optimizer, tmp_path)
    advance(model, optimizer, range(END + 2, TOTAL))

    again = fresh(seed=5)
    optimizer = adamw(again)
    again.load_adapter(tmp_path, "default", is_trainable=True)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    advance(again, optimizer, range(END + 2, TOTAL))
    assert_same(everything(again), everything(model))


@pytest.mark.parametrize("stop", [STOP, END, END + 2])
@pytest.mark.parametrize("writer", ["patched", "peft"])
def test_without_the_file(writer: str, stop: int, tmp_path: Path) -> None:
    """PEFT's format says which rows live and holds those: the outputs are equal, and pruning goes on."""
    model = fresh()
    advance(model, adamw(model), range(stop))
    if writer == "peft":
        unpatch_model(model)
    model.save_pretrained(tmp_path)
    patch_model(model)
    expected = {name: p for name, p in adapter_parameters(model).items() if "lora_E" in name}
    again = fresh(seed=5)
    before = list(adapter_parameters(again).values())
    with pytest.warns(UserWarning, match=f"no {STATE_FILE} in .*: averages start anew") as caught:
        again.load_adapter(tmp_path, "default", is_trainable=True)
    assert sum("averages start anew" in str(w.message) for w in caught) == 1
    assert all(p is q for p, q in zip(before, adapter_parameters(again).values(), strict=True))
    live = again.base_model.rank_allocator().importance.live
    assert torch.equal(live, model.base_model.rank_allocator().importance.live)
    assert again.base_model.rank_allocator().importance.updates == 0
    found = torch.cat([p for name, p in adapter_parameters(again).items() if "lora_E" in name])
    assert torch.equal(found, torch.cat(list(expected.values())) * live[:, None])
    advance(again, adamw(again), range(stop, TOTAL))
    pattern = again.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == 3 * len(pattern) and all(len(row) == 6 for row in pattern.values())


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> None:
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata())
    content = json.loads(metadata["content"])
    change(tensors, content)
    save_file(tensors, file, metadata={**metadata, "content": json.dumps(content)})


def _truncate(folder: Path) -> None:
    file = folder / STATE_FILE
    file.write_bytes(file.read_bytes()[:-100])


def _another_file(folder: Path) -> None:
    save_file({"weight": torch.zeros(3)}, folder / STATE_FILE)


def _missing_tensor(folder: Path) -> None:
    rewrite(folder / STATE_FILE, lambda tensors, content: tensors.pop("second.lora_E"))


def _missing_averages(folder: Path) -> None:
    rewrite(folder / STATE_FILE, lambda tensors, content: tensors.pop("average"))


def _not_finite(folder: Path) -> None:
    rewrite(folder / STATE_FILE, lambda tensors, content: tensors["average"].fill_(torch.nan))


def _other_variant(folder: Path) -> None:
    rewrite(folder / STATE_FILE, lambda tensors, content: content["allocator"].update(variant="paper"))


def _other_layers(folder: Path) -> None:
    rewrite(folder / STATE_FILE, lambda tensors, content: content.update(layers=content["layers"][:2]))


def _other_shapes(folder: Path) -> None:
    rewrite(folder / STATE_FILE, lambda tensors, content: tensors.update({"first.lora_A": torch.zeros(6, 7)}))


def _other_step(folder: Path) -> None:
    rewrite(folder / STATE_FILE, lambda tensors, content: tensors["first.lora_A"].mul_(1.5))


def _other_initial_rank(folder: Path) -> None:
    model = fresh(init_r=4)
    model.save_pretrained(folder)
    save_training_state(model, folder)


def _without_state(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / STATE_FILE).unlink()
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return damage


_A = "base_model.model.first.lora_A"
DAMAGES = {
    "truncated": (_truncate, "expected a whole safetensors file"),
    "another file": (_another_file, "expected 'adalora_kernels training state 1', got None"),
    "missing tensor": (_missing_tensor, "found no second.lora_E"),
    "missing averages": (_missing_averages, "found no average"),
    "not finite": (_not_finite, r"state\['average'\]: expected finite numbers"),
    "other variant": (_other_variant, "expected variant 'peft', got 'paper'"),
    "other layers": (_other_layers, "expected A, E and B of 2 layers, found third.lora_A besides"),
    "other shapes": (_other_shapes, "expected A, E and B of first as"),
    "other step": (_other_step, "of one and the same step, but they differ in first.lora_A.default"),
    "other initial rank": (_other_initial_rank, "expected layers of the same initial ranks"),
    "other width": (_without_state(lambda t: t.update({_A: t[_A][:, 1:].clone()})), "expected . rows of first"),
    "other rows": (_without_state(lambda t: t.update({_A: t[_A][1:].clone()})), "expected . rows of first"),
    "other rest": (
        _without_state(lambda t: t.update({"base_model.model.third.base_layer.bias": torch.zeros(9)})),
        r"expected model.third.base_layer.bias of shape \[4\], found \[9\]",
    ),
    "no adapter": (_without_state(lambda t: t.pop(_A)), "found no base_model.model.first.lora_A.default"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_refused(damage: str, checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    change, message = DAMAGES[damage]
    change(broken)
    model = fresh(seed=5)
    advance(model, adamw(model), range(STOP + 2))
    before = everything(model)
    with pytest.raises(ValueError, match=message) as error:
        model.load_adapter(broken, "default", is_trainable=True)
    assert "checkpoint" in str(error.value)  # the cure
    assert_same(everything(model), before)
    if (broken / STATE_FILE).exists() and damage != "other step":
        with pytest.raises(ValueError, match=message):
            load_training_state(model, broken)
        assert_same(everything(model), before)
    model.load_adapter(checkpoint, "default", is_trainable=True)
    assert_same(everything(model), whole(STOP))


def test_a_write_that_fails_leaves_the_file_of_before(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh()
    save_training_state(model, tmp_path)
    content = (tmp_path / STATE_FILE).read_bytes()

    def fail(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("adalora_kernels.integrations.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save_training_state(model, tmp_path)
    assert (tmp_path / STATE_FILE).read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


def test_wrong_targets(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="target: expected a patched PEFT model or a RankAllocator, got str"):
        save_training_state("model", tmp_path)
    with pytest.raises(ValueError, match=r"found 0; call patch_model\(model\) first"):
        save_training_state(build("perceptron"), tmp_path)
    with pytest.raises(ValueError, match=f"directory: expected a checkpoint with {STATE_FILE}, found none"):
        load_training_state(fresh(), tmp_path)


def test_our_own_layers(tmp_path: Path) -> None:
    def made(seed: int) -> tuple[nn.Module, RankAllocator]:
        torch.manual_seed(seed)
        model = nn.Sequential(SVDLinear(8, 9, r=4), SVDLinear(9, 5, r=4))
        return model, RankAllocator(model, 4, 2, 2, 4, 1, 0.85, 0.85, total_step=20)

    model, allocator = made(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with allocator.attach(optimizer):
        for _ in range(10):
            model(torch.randn(6, 8)).square().mean().backward()
            optimizer.step()
    save_training_state(allocator, tmp_path)
    again, restored = made(1)
    load_training_state(restored, tmp_path)
    lora = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    assert all(torch.equal(again.state_dict()[name], value) for name, value in lora.items())
    assert_same(restored.state_dict(), allocator.state_dict())


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """PEFT finds no vocabulary to compare with."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not find a config file")
        yield
