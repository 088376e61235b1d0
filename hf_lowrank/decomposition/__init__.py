"""Pure tensors in, tensors out: metrics, spectra, factors. Nothing here knows transformers."""
