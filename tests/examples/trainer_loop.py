"""AdaLoRA in transformers' Trainer, interrupted and resumed: python trainer_loop.py FOLDER"""

import sys

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from adalora_kernels import AdaLoraCallback, patch_model

STEPS = 16


def make_model() -> PeftModel:
    torch.manual_seed(0)  # a pretrained model is the same each time, too
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    schedule = {"init_r": 6, "target_r": 3, "tinit": 2, "tfinal": 4, "deltaT": 2, "total_step": STEPS}
    config = AdaLoraConfig(task_type="CAUSAL_LM", lora_alpha=12, target_modules=["q_proj", "v_proj"], **schedule)
    return patch_model(get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=64, **size)), config))


def train(folder: str, resume: bool = False) -> PeftModel:
    tokens = torch.randint(64, (32, 8), generator=torch.Generator().manual_seed(1))
    model = make_model()
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=4,
        save_steps=8,
        use_cpu=True,
        report_to=[],
    )
    data = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[AdaLoraCallback()])
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-8" if resume else None)
    return model


if __name__ == "__main__":
    train(sys.argv[1])
    model = train(sys.argv[1], resume=True)
    print(model.base_model.rank_allocator().live_ranks())
