"""Merges of recipes as they are, against mergekit 0.1.5 itself."""
