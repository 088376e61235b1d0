"""Factorization and loss optimised together: the truncation error is steered along the gradient."""
