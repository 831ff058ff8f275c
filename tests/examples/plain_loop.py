"""AdaLoRA in a plain PyTorch loop, interrupted and resumed: python plain_loop.py FOLDER"""

import sys

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from adalora_kernels import AdaLoraAdamW, patch_model, save_training_state

STEPS, HALF = 16, 8


def make_model() -> PeftModel:
    torch.manual_seed(0)  # a pretrained model is the same each time, too
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    schedule = {"init_r": 6, "target_r": 3, "tinit": 2, "tfinal": 4, "deltaT": 2, "total_step": STEPS}
    config = AdaLoraConfig(task_type="CAUSAL_LM", lora_alpha=12, target_modules=["q_proj", "v_proj"], **schedule)
    return patch_model(get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=64, **size)), config))


def train(folder: str, resume: bool = False) -> PeftModel:
    model = make_model()
    # torch.optim.AdamW does as well, after allocator.attach(optimizer); this one does the allocator's work by itself.
    allocator = model.base_model.rank_allocator()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdaLoraAdamW(trained, lr=1e-2, max_grad_norm=1.0, allocator=allocator)
    if resume:
        model.load_adapter(folder, "default", is_trainable=True)
        optimizer.load_state_dict(torch.load(f"{folder}/optimizer.pt"))
    model.train()
    for step in range(allocator.next_step, STEPS):
        tokens = torch.randint(64, (4, 8), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == HALF and not resume:
            model.save_pretrained(folder)  # as PEFT does, with live rows only
            save_training_state(model, folder)
            torch.save(optimizer.state_dict(), f"{folder}/optimizer.pt")
    return model


if __name__ == "__main__":
    train(sys.argv[1])
    print(train(sys.argv[1], resume=True).base_model.rank_allocator().live_ranks())
