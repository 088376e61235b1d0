"""Engines that serve compressed checkpoints; each needs `format/` and nothing above it."""
