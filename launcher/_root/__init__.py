"""ftplan: plan the memory, time and settings of a fine-tuning run, then launch it."""

__version__ = "0.1.0"
