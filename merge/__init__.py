"""Merging: methods as pure functions on tensors, and the source that applies them box by box."""
