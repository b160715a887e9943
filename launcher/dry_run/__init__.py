"""The real training step on fake tensors. Loads torch, in a process of its own."""
