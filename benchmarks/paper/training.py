"""One training with transformers' Trainer: a task's features, a prepared model, and what the run was set to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
)
from transformers.integrations import is_tensorboard_available
from transformers.trainer_utils import get_last_checkpoint

from benchmarks.paper.methods import Prepared, Setting
from benchmarks.paper.presets import Preset
from benchmarks.paper.tasks import ANSWERS, REGRESSION, SUMMARIES, Task, answers, sentences, summaries

PRECISIONS = ("fp32", "bf16", "fp16")
WARMUP_SHARE = 0.06  # of all steps, where the preset names none or the training is too short for them
NOT_RESUMED = ("adalora-peft",)  # PEFT can't load its own checkpoint into a training


@dataclass(frozen=True)
class Machine:
    """How a run uses what it runs on; nothing of it changes what is computed, but for rounding.

    The loss is the mean of the devices' and accumulated steps' means, in which a short summary's tokens weigh more.

    Attributes:
        precision: of ``PRECISIONS``.
        device_batch: rows a device takes at a time; the rest of the preset's batch is accumulated.
        workers: processes that make tokens.
        save_steps: optimizer steps from one checkpoint to the next.
        bars: whether progress is shown.
    """

    precision: str = "fp32"
    device_batch: int = 32
    workers: int = 1
    save_steps: int = 500
    bars: bool = True


def processes() -> PartialState:
    """Those that share this training: one, or as many as torchrun or accelerate has started.

    Without an accelerator that has to be said, or each process would train by itself.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def pretrained(task: Task, source: str | Path, head_dropout: float | None = None) -> nn.Module:
    """The pretrained model with a head for the task.

    Args:
        task: what is learnt.
        source: folder or repository.
        head_dropout: in front of DeBERTa's classifier; the configuration's own where None.
    """
    model: nn.Module
    if task.kind == SUMMARIES:
        model = AutoModelForSeq2SeqLM.from_pretrained(source)
    elif task.kind == ANSWERS:
        model = AutoModelForQuestionAnswering.from_pretrained(source)
    else:
        problem = {"problem_type": "regression"} if task.kind == REGRESSION else {}
        config = AutoConfig.from_pretrained(source, num_labels=task.classes, **problem)
        if head_dropout is not None:
            config.cls_dropout = head_dropout
        model = AutoModelForSequenceClassification.from_pretrained(source, config=config)
    # These take any keyword, so that the Trainer believes they divide by the number of items in a whole batch. They
    # take the mean over what they are given: the Trainer has to average over accumulated steps and over processes.
    model.accepts_loss_kwargs = False  # type: ignore[assignment]
    return model


def features(task: Task, rows: Dataset, tokenizer: Any, preset: Preset, workers: int, training: bool) -> Dataset:
    """The model's inputs."""
    if task.kind == SUMMARIES:
        return summaries.encode(rows, task, tokenizer, preset.length, preset.target_length, workers)
    if task.kind == ANSWERS:
        return answers.encode(rows, task, tokenizer, preset.length, preset.overlap, training, workers)
    return sentences.encode(rows, task, tokenizer, preset.length, workers)


def setting(preset: Preset, examples: int) -> Setting:
    """The method's settings for a training on so many examples.

    The paper's warm-ups are counted in steps of its own data. Where the training is too short for them, both shrink by
    one factor so that they take half of it.
    """
    total = max(1, math.ceil(preset.epochs * math.ceil(examples / preset.batch)))
    initial, final = preset.initial_warmup, preset.final_warmup
    if initial + final >= total:
        factor = total / 2 / (initial + final)
        initial, final = int(initial * factor), int(final * factor)
    return Setting(
        size=preset.size, alpha=preset.alpha, orthogonality=preset.orthogonality, total_steps=total,
        initial_warmup=initial, final_warmup=final, mask_interval=preset.mask_interval,
    )  # fmt: skip


def trainer(
    task: Task, prepared: Prepared, tokenizer: Any, training: Dataset, preset: Preset, setting: Setting, seed: int,
    machine: Machine, folder: Path, resumable: bool,
) -> Trainer:  # fmt: skip
    """A Trainer that is ready to train, and to predict.

    Raises:
        ValueError: a precision that isn't known, or a batch that devices can't share evenly.
    """
    if machine.precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {machine.precision!r}")
    if machine.precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("precision: fp16 needs a GPU, and there is none; take bf16 or fp32")
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder), seed=seed, max_steps=setting.total_steps, learning_rate=preset.learning_rate,
        lr_scheduler_type="linear", warmup_steps=_warmup(preset, setting.total_steps), weight_decay=preset.weight_decay,
        bf16=machine.precision == "bf16", fp16=machine.precision == "fp16",
        per_device_train_batch_size=min(machine.device_batch, preset.batch),
        per_device_eval_batch_size=machine.device_batch,
        save_strategy="steps" if resumable else "no", save_steps=machine.save_steps, save_total_limit=1,
        logging_steps=max(1, setting.total_steps // 50),
        report_to=["tensorboard"] if is_tensorboard_available() else [],
        use_cpu=not torch.accelerator.is_available(), disable_tqdm=not machine.bars,
        log_level="passive" if machine.bars else "error",
        predict_with_generate=task.kind == SUMMARIES, generation_max_length=preset.target_length or None,
        generation_num_beams=preset.beams or None, dataloader_pin_memory=False,
    )  # fmt: skip
    shared = arguments.per_device_train_batch_size * arguments.world_size
    if preset.batch % shared:
        raise ValueError(
            f"device_batch: expected a share of the batch of {preset.batch}, got {shared} over all devices"
        )
    arguments.gradient_accumulation_steps = preset.batch // shared
    kind, collator = (
        (Seq2SeqTrainer, DataCollatorForSeq2Seq(tokenizer))
        if task.kind == SUMMARIES
        else (Trainer, DataCollatorWithPadding(tokenizer))
    )
    made = kind(
        model=prepared.model, args=arguments, train_dataset=training, processing_class=tokenizer,
        data_collator=collator, callbacks=list(prepared.callbacks),
    )  # fmt: skip
    if not machine.bars:
        made.remove_callback(PrinterCallback)  # which the Trainer puts where its bar would be
    return made


def _warmup(preset: Preset, total_steps: int) -> int:
    return preset.warmup if 0 < preset.warmup <= total_steps / 2 else int(WARMUP_SHARE * total_steps)


def train(run: Trainer, folder: Path) -> None:
    """Train to the end, from the last checkpoint in ``folder`` where there is one."""
    run.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)


__all__ = ["NOT_RESUMED", "PRECISIONS", "Machine", "features", "pretrained", "processes", "setting", "train", "trainer"]
