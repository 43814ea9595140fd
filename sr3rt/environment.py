"""What a timing was taken on: machine, libraries, settings."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sr3rt import __version__

PACKAGES = (
    "numpy",
    "pillow",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "torch",
    "onnx",
    "safetensors",
)


def packages() -> dict[str, str | None]:
    """Versions of what matters here; None for what is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def describe(*, threads: int) -> dict[str, object]:
    """Facts for a report, JSON-ready; what cannot be read here is None."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "sr3rt": __version__,
        "commit": _run("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"),
        "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": _cpu(),
        "instructions": _instructions(),
        "cores": os.cpu_count(),
        "threads": threads,
        "clock_mhz": _number(r"cpu MHz\s*:\s*([\d.]+)", _read("/proc/cpuinfo")),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "gpu": _run("nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,persistence_mode", "--format=csv,noheader"),
        "packages": packages(),
    }


def _cpu() -> str:
    match = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo") or "")
    return match[1] if match else platform.processor() or platform.machine()


def _instructions() -> list[str] | None:
    """Those that decide how fast a network can be."""
    match = re.search(r"flags\s*:\s*(.+)", _read("/proc/cpuinfo") or "")
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
    return [name for name in wanted if name in match[1].split()] if match else None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _number(pattern: str, text: str | None) -> float | None:
    match = re.search(pattern, text or "")
    return float(match[1]) if match else None


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
