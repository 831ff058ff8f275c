"""Where Hugging Face PEFT and transformers' Trainer are met; nothing else in the package imports either."""
