"""Recommended configurations against the paper's own, and the warnings of settings that cripple AdaLoRA."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DebertaV2Config,
    DebertaV2ForQuestionAnswering,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from adalora_kernels import patch_model, recommended_config
from adalora_kernels.integrations import guidance
from adalora_kernels.integrations.guidance import check_config, infer_task_type
from tests.integrations.small_models import batch, build


@pytest.fixture(autouse=True)
def first_time() -> Iterator[None]:
    """Each test meets every warning for the first time."""
    guidance._warn_once.cache_clear()
    yield
    guidance._warn_once.cache_clear()


@pytest.fixture(scope="module")
def paper_model() -> nn.Module:
    """DeBERTaV3-base in shape, without memory."""
    config = DebertaV2Config(
        vocab_size=128100, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_biased_input=False,
        type_vocab_size=0,
    )  # fmt: skip
    with torch.device("meta"):
        return DebertaV2ForSequenceClassification(config)


def adapted(model: nn.Module, config: AdaLoraConfig) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(model, config)
    return [name for name, _ in peft_model.get_base_model().named_parameters() if ".lora_E." in name]


@pytest.mark.parametrize(
    ("budget", "target", "initial"),
    # The paper's budgets on DeBERTaV3-base with its ranks: tables 1 and 2, and the appendix on hyper-parameters.
    [
        ("1.27M", 8, 12),
        ("0.61M", 4, 6),
        ("0.32M", 2, 4),
        ("0.31M", 2, 4),
        ("0.08%", 1, 2),
        ("576 triplets", 8, 12),
        ("144 Triplets", 2, 4),
        (" 320 K ", 2, 4),
        ("0.0013B", 8, 12),
        (8, 8, 12),
    ],
)
def test_budgets_of_the_paper(paper_model: nn.Module, budget: int | str, target: int, initial: int) -> None:
    config = recommended_config(paper_model, 85_900, budget)
    assert (config.target_r, config.init_r, config.lora_alpha) == (target, initial, 2 * initial)


@pytest.mark.parametrize(
    ("steps", "initial", "final"),
    # MNLI, RTE, SST-2 and CoLA, the paper's own lengths: what is recommended is within a factor of two of its choice.
    [(85_900, 8000, 50_000), (3900, 600, 1800), (50_500, 6000, 22_000), (6700, 800, 3500)],
)
def test_schedule_is_near_the_papers(paper_model: nn.Module, steps: int, initial: int, final: int) -> None:
    config = recommended_config(paper_model, steps, 4)
    for ours, paper in ((config.tinit, initial), (config.tfinal, final)):
        assert 0.5 < ours / paper < 2
    pruning = steps - config.tinit - config.tfinal
    assert 1 <= config.deltaT <= 100 and 64 <= pruning // config.deltaT <= 1500  # as in the paper
    assert config.total_step == steps and config.beta1 == config.beta2 == 0.85 and config.orth_reg_weight == 0.1


@pytest.mark.parametrize("steps", [4, 5, 10, 1000])
def test_short_trainings_leave_room_for_pruning(steps: int) -> None:
    config = recommended_config(build("llama").unload(), steps, 2)
    assert config.tinit < steps - config.tfinal


def test_adapts_the_papers_matrices_and_trains_the_head_whole(paper_model: nn.Module) -> None:
    config = recommended_config(paper_model, 1000, 8)
    assert config.task_type == "SEQ_CLS" and set(config.modules_to_save) == {"pooler", "classifier"}
    names = adapted(paper_model, config)
    assert len(names) == 72 and not any("pooler" in name or "classifier" in name for name in names)


@pytest.mark.parametrize("architecture", ["deberta", "llama", "gpt2", "t5", "vit"])
def test_trains_as_it_is(architecture: str) -> None:
    base = build(architecture).unload()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = recommended_config(base, 20, 2)
        model = patch_model(get_peft_model(base, config)).train()
    assert sum("lora_E" in name for name, _ in model.named_parameters()) >= 8
    assert not any("lm_head" in name or "classifier" in name for name, _ in model.named_parameters() if "lora_" in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(20):
        model.base_model(**batch(model, seed=step)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    pattern = config.rank_pattern
    assert pattern is not None and sum(map(sum, pattern.values())) == 2 * len(pattern)


def test_conv1d_is_told_to_peft_beforehand() -> None:
    base = build("gpt2").unload()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(base, recommended_config(base, 100, 2))
    assert not [w for w in caught if "fan_in_fan_out" in str(w.message)]


SMALL: dict[str, Any] = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("model", "config", "task_type"),
    [
        (DebertaV2ForSequenceClassification, DebertaV2Config, "SEQ_CLS"),
        (DebertaV2ForQuestionAnswering, DebertaV2Config, "QUESTION_ANS"),
        (LlamaForCausalLM, LlamaConfig, "CAUSAL_LM"),
        (BertModel, BertConfig, "FEATURE_EXTRACTION"),
        (BertForMaskedLM, BertConfig, None),
        (ViTForImageClassification, ViTConfig, None),
        (type("Mine", (LlamaForCausalLM,), {}), LlamaConfig, "CAUSAL_LM"),
    ],
)
def test_task_type_of_the_class(model: Any, config: Any, task_type: str | None) -> None:
    with torch.device("meta"):
        assert infer_task_type(model(config(**SMALL, intermediate_size=8))) == task_type
    assert infer_task_type(nn.Linear(2, 2)) is None


def test_sequence_to_sequence_where_this_peft_can() -> None:
    """PEFT to 0.20 can't build its model of this task under transformers 5; a configuration mustn't lead there."""
    model = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9))
    assert infer_task_type(model) in ("SEQ_2_SEQ_LM", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the task type that is missing then
        config = recommended_config(model, 100, 2)
    assert len(adapted(model, config)) == 16


def test_own_choices_replace_what_is_recommended() -> None:
    base = build("llama").unload()
    config = recommended_config(base, 100, "12 triplets", target_modules=["q_proj", "v_proj"], init_r=5, beta1=0.9)
    assert (config.target_r, config.init_r, config.lora_alpha, config.beta1) == (3, 5, 10, 0.9)
    names = adapted(base, config)
    assert len(names) == 4 and all("q_proj" in name or "v_proj" in name for name in names)


def test_orthogonality_is_weighed_by_the_loss() -> None:
    base = build("llama").unload()
    assert recommended_config(base, 100, 2, reducible_loss=0.02).orth_reg_weight == pytest.approx(0.002)
    assert recommended_config(base, 100, 2, reducible_loss=0.02, orth_reg_weight=0.3).orth_reg_weight == 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": "12 parsecs"}, "budget: expected an average rank such as 8, .* got '12 parsecs'"),
        ({"budget": 2.5}, "budget: expected"),
        ({"budget": True}, "budget: expected"),
        ({"budget": 0}, "an average rank of 1 to 15 for the model's 14 layers, 0 is 0"),
        ({"budget": "1M"}, "'1M' is 1062"),
        ({"budget": "0.1k"}, "'0.1k' is 0; change the budget"),
        ({"total_step": 3}, "total_step: expected at least 4 optimizer steps, got 3"),
        ({"total_step": "auto"}, "total_step: expected"),
        ({"target_modules": ["nowhere"]}, r"target_modules: .* got \['nowhere'\]"),
        ({"target_modules": []}, "target_modules: expected names"),
        ({"reducible_loss": 0}, "reducible_loss: expected a positive number, got 0"),
        ({"reducible_loss": float("inf")}, "reducible_loss: expected"),
        ({"model": nn.ReLU()}, "model: expected linear layers to adapt"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"model": build("llama").unload(), "total_step": 100, "budget": 2, **change}
    with pytest.raises(ValueError, match=message):
        recommended_config(**arguments)


def test_arguments_of_wrong_types() -> None:
    with pytest.raises(TypeError, match="model: expected the base model, got str"):
        recommended_config("llama", 100, 2)  # type: ignore[arg-type]
    base = build("llama").unload()
    for names in ("all-linear", 3):
        with pytest.raises(TypeError, match=r"target_modules: expected a list of names, got ('all-linear'|3)"):
            recommended_config(base, 100, 2, target_modules=names)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="init_r: expected a number, got '6'"):
        recommended_config(base, 100, 2, init_r="6")


def configured(**changes: Any) -> AdaLoraConfig:
    return AdaLoraConfig(**{"task_type": "CAUSAL_LM", "total_step": 100, "lora_alpha": 24, **changes})


@pytest.mark.parametrize(
    ("changes", "cure"),
    [
        ({"task_type": None}, "call patch_model"),
        # Hugging Face's comparison of methods (Llama-3.2-3B): 8/64, where its LoRA had 2.
        ({"lora_alpha": 8, "init_r": 64}, "set lora_alpha=128"),
        ({"lora_alpha": 1200}, "set lora_alpha=24"),
        ({"target_r": 12}, "set init_r=18"),
        ({"target_r": 16}, "set init_r=24"),
    ],
)
def test_each_misconfiguration_is_warned_about_once(changes: dict[str, Any], cure: str) -> None:
    config = configured(**changes)
    with pytest.warns(UserWarning, match=cure) as caught:
        found = [check_config(config) for _ in range(3)]
    assert len(caught) == 1 and caught[0].filename == __file__
    assert [len(texts) for texts in found] == [1, 1, 1]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"lora_alpha": -1},
        {"task_type": None, "orth_reg_weight": 0.0},
        {"lora_alpha": 32, "init_r": 2, "target_r": 1},
    ],
)
def test_nothing_is_said_of_sane_ones(config: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_config(configured(**config)) == []
        assert check_config(configured(task_type=None), patched=True) == []


def test_patching_warns_of_what_it_does_not_cure() -> None:
    model = build("llama", task_type=None, lora_alpha=1)
    with pytest.warns(UserWarning, match="lora_alpha") as caught:
        patch_model(model)
        patch_model(model)
    assert len([w for w in caught if "AdaLoRA" in str(w.message)]) == 1
    guidance._warn_once.cache_clear()
    model.peft_config["default"].inference_mode = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_model(model)
