"""Comparisons that take minutes: the figures of README and docs come from here."""
