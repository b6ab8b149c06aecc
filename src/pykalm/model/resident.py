"""What this process holds of the machine's memory: apart from pykalm.memory, which every command reads at its start."""

import psutil


def resident_bytes() -> int:
    """Return the memory of the machine that this process holds."""
    return int(psutil.Process().memory_info().rss)
