"""What a container may have is what is planned with: memory, of which files that the kernel keeps are free, and processors."""

from __future__ import annotations

from pathlib import Path

import pytest

from sr3rt import cgroup, memory
from sr3rt.backends import Request

MIB = 2**20


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    return tmp_path


def write(folder: Path, **files: object) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_kept_files_are_not_in_the_way(group: Path) -> None:
    write(group, memory__max=100 * MIB, memory__current=99 * MIB, memory__stat=f"anon 5\ninactive_file {60 * MIB}\nfile 7")
    assert cgroup.memory() == 61 * MIB
    available = memory.available()
    assert available is not None and available <= 61 * MIB


def test_version_1(group: Path) -> None:
    stat = f"inactive_file 1\ntotal_inactive_file {2 * MIB}"
    write(group / "memory", memory__limit_in_bytes=10 * MIB, memory__usage_in_bytes=4 * MIB, memory__stat=stat)
    write(group / "cpu", cpu__cfs_quota_us=150_000, cpu__cfs_period_us=100_000)
    assert (cgroup.memory(), cgroup.processors()) == (8 * MIB, 1.5)
    write(group / "cpu", cpu__cfs_quota_us=-1)
    assert cgroup.processors() is None


def test_no_limit_and_no_group(group: Path) -> None:
    assert (cgroup.memory(), cgroup.processors()) == (None, None)
    write(group, memory__max="max", memory__current=5, cpu__max="max 100000")
    assert (cgroup.memory(), cgroup.processors()) == (None, None)


def test_no_more_threads_than_processors_may_be_kept_busy(group: Path) -> None:
    write(group, cpu__max="50000 100000")
    assert Request().thread_count == 1
    assert Request(threads=7).thread_count == 7
