"""The pure part of ftplan: specifications and data in, numbers and reasons out.

Standard library only; no input or output, no clock, no environment, no torch.
"""
