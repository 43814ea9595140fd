"""What Linux lets this process's control group have: of memory and of processors. Containers are made of these, in version 2 or 1.

A group is a folder, and its limits hold for the groups inside it too: what counts is the least on the way from this process's to the root.

Fields: https://docs.kernel.org/admin-guide/cgroup-v2.html and …/cgroup-v1/memory.html; OWN: cgroups(7).
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def memory() -> int | None:
    """Bytes left; what the kernel keeps of files, and gives up when asked to, counts as left. None: no limit, or not known."""
    left = []
    for controller, limit, used, cache in (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for group in _groups(controller):
            most, now = _number(group / limit), _number(group / used)
            if most is not None and now is not None:
                left.append(max(0, most - now + _field(group / "memory.stat", cache)))
    return min(left, default=None)


def processors() -> float | None:
    """As many as this may keep busy. None: no limit, or not known."""
    shares = [_share(group / "cpu.max") for group in _groups("")]
    for group in _groups("cpu"):
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        shares.append(quota / period if quota and period and quota > 0 else None)
    return min((share for share in shares if share is not None), default=None)


def _groups(controller: str) -> list[Path]:
    """This process's group and those around it, up to the root, of a controller of version 1, or of version 2: ""."""
    root, own = ROOT / controller, PurePosixPath(_own(controller).lstrip("/"))
    if ".." in own.parts or not (root / own).is_dir():  # outside what this container shows, whose root is what limits it
        return [root]
    return [root / own, *(root / around for around in own.parents)]


def _own(controller: str) -> str:
    try:
        lines = [line.split(":", 2) for line in OWN.read_text().splitlines()]
        return next(path for _, controllers, path in lines if controller in controllers.split(","))
    except (OSError, ValueError, StopIteration):
        return "/"


def _share(path: Path) -> float | None:
    """Of version 2: quota and period in one file."""
    try:
        quota, period = path.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


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
