"""From spectra to rank plans. Nothing here knows a model."""
