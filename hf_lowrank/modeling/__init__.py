"""The only code that edits a model."""
