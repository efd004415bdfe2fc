"""Continued pretraining on DeepSpeed: the loop, optimizer groups, schedules, checkpoints and resume."""
