"""Losses as pure functions: tensors in, `LossOutput` out. No configuration, no I/O, no random numbers."""
