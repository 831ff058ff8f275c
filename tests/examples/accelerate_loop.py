"""AdaLoRA in a loop with accelerate, interrupted and resumed: python accelerate_loop.py FOLDER"""

import sys

import torch
from accelerate import Accelerator
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from adalora_kernels import load_training_state, patch_model, save_training_state

STEPS, HALF, MICRO_BATCHES = 16, 8, 2


def make_model() -> PeftModel:
    torch.manual_seed(0)  # a pretrained model is the same each time, too
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    schedule = {"init_r": 6, "target_r": 3, "tinit": 2, "tfinal": 4, "deltaT": 2, "total_step": STEPS}
    config = AdaLoraConfig(task_type="CAUSAL_LM", lora_alpha=12, target_modules=["q_proj", "v_proj"], **schedule)
    return patch_model(get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=64, **size)), config))


def train(folder: str, resume: bool = False) -> PeftModel:
    tokens = torch.randint(64, (2 * MICRO_BATCHES * STEPS, 8), generator=torch.Generator().manual_seed(1))
    adalora = make_model()
    optimizer = torch.optim.AdamW((p for p in adalora.parameters() if p.requires_grad), lr=1e-2)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO_BATCHES)
    model, optimizer, loader = accelerator.prepare(adalora, optimizer, DataLoader(tokens, batch_size=2))
    allocator = adalora.base_model.rank_allocator()
    allocator.attach(optimizer)  # each real optimizer step scores and masks

    def save(models: list, weights: list, directory: str) -> None:
        save_training_state(adalora, directory, main_process=accelerator.is_main_process)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(lambda models, directory: load_training_state(adalora, directory))
    if resume:
        accelerator.load_state(folder)
        loader = accelerator.skip_first_batches(loader, allocator.next_step * MICRO_BATCHES)
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients and allocator.next_step == HALF and not resume:
            accelerator.save_state(folder)
    return adalora


if __name__ == "__main__":
    train(sys.argv[1])
    print(train(sys.argv[1], resume=True).base_model.rank_allocator().live_ranks())
