"""Whole runs on fine-tuning tasks: dense fine-tuning, compression by a method, fine-tuning."""

from hf_lowrank.tasks import task_card as task_card  # registers the card of a TaskReport
