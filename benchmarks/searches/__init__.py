"""Searches for ranks of other systems, to compare the one threshold with."""
