"""Searches for ranks beside the one threshold."""
