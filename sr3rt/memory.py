"""How much memory this process can still have."""

from __future__ import annotations

import os
from pathlib import Path

from sr3rt import cgroup


def available() -> int | None:
    """Bytes: the kernel's estimate of what is available, and what is left of the control group's limit. None where unknown."""
    found = []
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError):
        pass  # not Linux
    left = cgroup.memory()
    if left is not None:
        found.append(left)
    if not found and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found) if found else None
