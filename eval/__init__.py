"""Evaluation of any Source: bits per byte, acceptability pairs, baselines, intervals, text samples."""
