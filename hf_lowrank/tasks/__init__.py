"""Whole runs on fine-tuning tasks: dense fine-tuning, compression by a method, fine-tuning."""
