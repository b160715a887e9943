"""Adapters into the weights of their base model; loaded by `ftplan merge` only."""
