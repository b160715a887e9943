"""What runs in the training process; imports torch, transformers, peft and trl."""
