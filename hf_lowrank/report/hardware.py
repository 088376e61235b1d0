"""What a measured time depends on besides the code: the processor or the accelerator."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def processor_name() -> str:
    """Name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").split("\n")
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Name of what a device is: of the accelerator, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
