"""The verbs: analyze, decide, apply, and what they are made of."""
