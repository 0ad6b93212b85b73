"""What this machine has, asked without torch: processors, memory, GPUs and packages that a local run may use."""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path

NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def installed_version(package: str) -> str | None:
    """Of a distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def num_cpus() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_gpus() -> int:
    """CUDA devices visible to this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1", "NoDevFiles")])
    return len(list(NVIDIA_GPUS.iterdir())) if NVIDIA_GPUS.is_dir() else 0


def driver_branch() -> int | None:
    """Of the NVIDIA driver (580 of 580.65.06); None where it does not say."""
    if not NVIDIA_DRIVER.is_file():
        return None
    found = re.search(r"\s(\d{3,})\.\d+", NVIDIA_DRIVER.read_text(encoding="utf-8", errors="replace"))
    return int(found[1]) if found else None


def memory_bytes() -> int:
    """Physical memory, or the container's limit where that is lower."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        return min(total, int(text))
    return total
