"""Compression of models larger than memory: block by block, from disk to disk."""
