"""What Linux lets this process's control group have: of memory and of processors. Containers are made of these, in version 2 or 1.

Fields: https://docs.kernel.org/admin-guide/cgroup-v2.html and …/cgroup-v1/memory.html.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def memory() -> int | None:
    """Bytes left; what the kernel keeps of files, and gives up when asked to, counts as left. None: no limit, or not known."""
    for limit, used, folder, cache in (
        ("memory.max", "memory.current", ROOT, "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", ROOT / "memory", "total_inactive_file"),
    ):
        most, now = _number(folder / limit), _number(folder / used)
        if most is not None and now is not None:
            return max(0, most - now + _field(folder / "memory.stat", cache))
    return None


def processors() -> float | None:
    """As many as this may keep busy. None: no limit, or not known."""
    try:
        quota, period = (ROOT / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    share, whole = _number(ROOT / "cpu" / "cpu.cfs_quota_us"), _number(ROOT / "cpu" / "cpu.cfs_period_us")
    return share / whole if share and whole and share > 0 else None


def _number(path: Path) -> int | None:
    """None also for "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _field(path: Path, name: str) -> int:
    try:
        return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(f"{name} "))
    except (OSError, ValueError, StopIteration):
        return 0
