"""Transformers that predict the tokens of a scale from all coarser ones."""
