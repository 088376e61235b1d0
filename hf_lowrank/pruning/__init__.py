"""LPAF: prune while fine-tuning, factorize what survives, fine-tune with mixed rank."""
