"""Checkpoints as sources of tensors: read lazily, written in place, complete if and only if the manifest exists."""
