"""Losses and moments of a model on batches, on one process or several."""
