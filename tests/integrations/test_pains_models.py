"""What users have met with models, dtypes and checkpoints, by thread: P of huggingface/peft, A of QingruZhang/AdaLoRA.

A scenario runs on both sides: unpatched PEFT shows the pain, ours doesn't. Where PEFT can't show it here, the docstring
says why.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from adalora_kernels import export_lora
from adalora_kernels.integrations.adalora_model import FusedAdaLoraModel
from adalora_kernels.integrations.peft import layer_report, patch_model, patch_peft, unpatch_peft
from adalora_kernels.testing.tolerances import assert_within_budget
from tests.integrations.small_models import (
    adapter_parameters,
    backward,
    batch,
    build,
    live_total,
    pattern,
    train,
    twins,
)


def _save(model: PeftModel, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no vocabulary to compare with
        model.save_pretrained(folder)
    return folder


def _load(folder: Path, patched: bool, architecture: str = "llama", **options: object) -> PeftModel:
    base = build(architecture, dtype=options.pop("dtype", torch.float32)).unload()
    if patched:
        patch_peft()
    try:
        model = PeftModel.from_pretrained(base, folder, **options)
    finally:
        unpatch_peft()
    assert isinstance(model.base_model, FusedAdaLoraModel) is patched
    return model.eval()


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch(build("llama"), seed=99)["input_ids"]).logits


@pytest.mark.parametrize("thread", ["P1539", "P1540"])
def test_P1539_P1540_a_layer_without_rank(thread: str, tmp_path: Path) -> None:
    """Loading, and merging as the thread did, where a layer has lost every triplet; mended in PEFT by P1540."""
    model = patch_model(build("llama", target_r=1))
    train(model, 20)
    assert 0 in map(sum, pattern(model).values())
    folder, expected = _save(model, tmp_path), _logits(model)
    for patched in (False, True):
        loaded = _load(folder, patched)
        result = _logits(loaded.merge_and_unload() if thread == "P1539" else loaded)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("thread", ["P571", "P745"])
def test_P571_P745_defect_6_inference(thread: str, tmp_path: Path) -> None:
    """Evaluation of a loaded adapter, with labels as in P571; P745 mended the case without."""
    folder = _save(build("llama"), tmp_path)
    theirs, ours = (_load(folder, patched, is_trainable=False) for patched in (False, True))
    inputs = batch(theirs)
    if thread == "P745":
        del inputs["labels"]
        torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits)
        return
    with pytest.raises(AttributeError, match="trainable_adapter_name"):
        theirs(**inputs)
    for training in (False, True):
        torch.testing.assert_close(ours.train(training)(**inputs).loss, ours.get_base_model()(**inputs).loss)
    with pytest.raises(ValueError, match="update_and_allocate: expected a trainable AdaLoRA adapter"):
        ours.base_model.update_and_allocate(0)


def test_P1309_a_bf16_base_under_fp32_adapters(tmp_path: Path) -> None:
    """``expected mat1 and mat2 to have the same dtype`` at inference; PEFT has cast the input since."""
    model = build("llama", dtype=torch.bfloat16)
    folder, exact = _save(model, tmp_path), _logits(copy.deepcopy(model).double())
    theirs, ours = (_load(folder, patched, dtype=torch.bfloat16, is_trainable=False) for patched in (False, True))
    assert {p.dtype for name, p in ours.named_parameters() if "lora_" in name} == {torch.float32}
    assert_within_budget("logits", _logits(ours), _logits(theirs), exact)


def test_P1495_averages_of_16_bit_adapters() -> None:
    """With autocast_adapter_dtype=False PEFT keeps the averages in bf16 too, and most of a small term is lost."""
    theirs, ours = twins(build("llama", dtype=torch.bfloat16, autocast_adapter_dtype=False, total_step=200))
    exact: dict[str, Tensor] = {}
    for step in range(20):
        backward(ours, seed=step)
        for (name, mine), other in zip(
            adapter_parameters(ours).items(), adapter_parameters(theirs).values(), strict=True
        ):
            other.grad = mine.grad.clone()
            sensitivity = (mine.detach().double() * mine.grad.double()).abs()
            exact[name] = 0.85 * exact.get(name, torch.zeros_like(sensitivity)) + 0.15 * sensitivity
        for model in (theirs, ours):
            model.base_model.update_and_allocate(step)
    allocator, prefix = ours.base_model.rank_allocator(), "base_model.model."
    names = [name for triplet in allocator.triplets for name in triplet.parameter_names]
    reference = torch.cat([exact[prefix + name].reshape(-1) for name in names])
    theirs_average = torch.cat([theirs.base_model.rankallocator.exp_avg_ipt[name].reshape(-1) for name in names])
    average = allocator.importance.current()[0]
    assert theirs_average.dtype == torch.bfloat16 and average.dtype == torch.float32
    errors = [float((a.double() - reference).norm() / reference.norm()) for a in (theirs_average, average)]
    assert errors[0] > 1e-3 > 1e-6 > errors[1]


def test_A12_defect_1_ranknum_is_a_constant(tmp_path: Path) -> None:
    """From 0.21.0 on it trains over a 16-bit base and isn't saved. Earlier PEFTs leave it frozen: here it is thawed."""
    model = build("llama", dtype=torch.bfloat16, target_r=5)
    for name, parameter in model.named_parameters():
        if "ranknum" in name:
            parameter.requires_grad_(True)
    for patched, twin in enumerate(twins(model)):
        train(twin, 20, lr=0.05)
        values = {p.item() for name, p in twin.named_parameters() if "ranknum" in name}
        assert (values == {6.0}) is bool(patched)
        folder, before = _save(twin, tmp_path / str(patched)), _logits(twin)
        after = _logits(_load(folder, bool(patched), dtype=torch.bfloat16))
        error = float((after - before).norm() / before.norm())
        assert error == 0 if patched else error > 0.01


def test_P2322_merging_and_serving(tmp_path: Path) -> None:
    """Merging works on both sides, as PEFT's maintainers answered; what can't be merged must be served as LoRA."""
    theirs = build("llama")
    train(theirs, 20)
    ours, expected = patch_model(copy.deepcopy(theirs)), _logits(theirs)
    for model in (theirs, ours):
        torch.testing.assert_close(_logits(copy.deepcopy(model).merge_and_unload()), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.save_as_lora(tmp_path / "peft", theirs, rank=3)
    ranks = export_lora(ours, tmp_path / "ours")
    assert sum(ranks.values()) == 3 * len(ranks) and len(set(ranks.values())) > 1
    served = PeftModel.from_pretrained(build("llama").unload(), tmp_path / "ours")
    torch.testing.assert_close(_logits(served), expected, rtol=1e-4, atol=1e-5)


def test_P3193_conv2d() -> None:
    """PEFT ≥ 0.20 adapts it. Ours leaves that layer to PEFT and says so."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 4))
    config = AdaLoraConfig(target_modules=["0", "2"], init_r=3, target_r=2, total_step=9)
    try:
        theirs, ours = twins(get_peft_model(model, config))
    except ValueError as error:
        assert "Conv2d" in str(error)  # an earlier PEFT
        return
    x = torch.randn(2, 1, 4, 4)
    torch.testing.assert_close(ours(x), theirs(x))
    reports = {report.name.rpartition(".")[2]: report for report in layer_report(ours)}
    assert reports["2"].fused and not reports["0"].fused and "keeps PEFT's code" in reports["0"].reason


def test_P1846_conv1d() -> None:
    """The thread's Whisper has ``nn.Conv1d``, which PEFT refuses; ``Conv1D``, GPT-2's linear layer, is fused."""
    for patched in (False, True):
        whisper = build("whisper").unload()
        if patched:
            patch_peft()
        with pytest.raises(ValueError, match=r"Target module Conv1d\(.* is not supported"):
            get_peft_model(whisper, AdaLoraConfig(target_modules=["conv1", "conv2", "q_proj"], total_step=9))
    unpatch_peft()
    theirs, ours = twins(build("gpt2"))
    assert {type(m.base_layer).__name__ for m in ours.modules() if hasattr(m, "base_layer")} == {"Conv1D"}
    assert all(report.fused for report in layer_report(ours))
    torch.testing.assert_close(ours(**batch(ours)).logits, theirs(**batch(theirs)).logits)


def test_P529_embedding() -> None:
    """PEFT refuses it, and so do we: what is no AdaLoRA layer in PEFT has no checkpoint format."""
    for patched in (False, True):
        if patched:
            patch_peft()
        with pytest.raises(ValueError, match=r"Target module Embedding\(5, 4\) is not supported"):
            get_peft_model(nn.Sequential(nn.Embedding(5, 4)), AdaLoraConfig(target_modules=["0"], total_step=9))


def _over_8_bit_attention(dtype: torch.dtype) -> PeftModel:
    """A model whose queries and values are adapted over bitsandbytes' 8-bit layers, as ``load_in_8bit`` makes them."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = build("llama").unload().to(dtype)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            linear = getattr(layer.self_attn, name)
            base = bitsandbytes.nn.Linear8bitLt(32, linear.out_features, bias=False, has_fp16_weights=False)
            base.load_state_dict(linear.state_dict())
            setattr(layer.self_attn, name, base.to("cpu"))  # .to() quantises
    model.is_loaded_in_8bit = True
    settings = {"init_r": 6, "target_r": 3, "lora_alpha": 12, "tinit": 2, "tfinal": 4, "deltaT": 2, "total_step": 20}
    config = AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **settings)
    peft_model = get_peft_model(model, config)
    for name, parameter in peft_model.named_parameters():
        if "lora_E" in name:
            nn.init.normal_(parameter)
    return peft_model.train()


def test_P1146_an_8_bit_base() -> None:
    """``lora_A.weight`` didn't exist and an addition in place failed; mended by P1146, which makes a new sum."""
    theirs, ours = twins(_over_8_bit_attention(torch.float32))
    assert all(report.fused for report in layer_report(ours))
    expected, actual = train(theirs, 20), train(ours, 20)
    assert actual == pytest.approx(expected, rel=1e-4)
    assert live_total(ours) == live_total(theirs) == 3 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_A27_defect_11_an_8_bit_base_under_a_16_bit_model(dtype: torch.dtype) -> None:
    """PEFT's sum is in fp32, and attention gets queries and keys of two dtypes."""
    theirs, ours = twins(_over_8_bit_attention(dtype))
    with pytest.raises(RuntimeError, match="to have the same dtype"):
        train(theirs, 1)
    losses = train(ours, 20)
    assert losses[-1] < losses[0] and live_total(ours) == 3 * 4
