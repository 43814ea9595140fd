"""What a container may have is what is planned with: memory, of which files that the kernel keeps are free, and processors."""

from __future__ import annotations

from pathlib import Path

import pytest

from sr3rt import cgroup, memory
from sr3rt.backends import Request

MIB = 2**20


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a made-up tree, which is also this process's group until `own` says another."""
    monkeypatch.setattr(cgroup, "ROOT", tmp_path / "fs")
    monkeypatch.setattr(cgroup, "OWN", tmp_path / "own")
    return tmp_path / "fs"


def own(group: Path, lines: str) -> None:
    """As in /proc/self/cgroup."""
    (group.parent / "own").write_text(lines)


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
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


def test_the_least_of_the_limits_from_the_own_group_to_the_root_counts(group: Path) -> None:
    own(group, "0::/service/job\n")
    write(group / "service", memory__max=100 * MIB, memory__current=90 * MIB, cpu__max="800000 100000")
    write(group / "service" / "job", memory__max=50 * MIB, memory__current=20 * MIB, cpu__max="250000 100000")
    write(group / "another", memory__max=MIB, memory__current=MIB, cpu__max="10000 100000")
    assert (cgroup.memory(), cgroup.processors()) == (10 * MIB, 2.5)
    write(group / "service" / "job", memory__max="max", cpu__max="max 100000")
    assert (cgroup.memory(), cgroup.processors()) == (10 * MIB, 8)


def test_version_1_has_a_path_for_each_controller(group: Path) -> None:
    own(group, "12:cpuset:/wrong\n5:memory:/a/b\n4:cpu,cpuacct:/a\n1:name=systemd:/wrong\n0::/wrong\n")
    write(group / "memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=99 * MIB)
    write(group / "memory" / "a", memory__limit_in_bytes=30 * MIB, memory__usage_in_bytes=10 * MIB)
    write(group / "memory" / "a" / "b", memory__limit_in_bytes=9 * MIB, memory__usage_in_bytes=2 * MIB)
    write(group / "cpu" / "a", cpu__cfs_quota_us=50_000, cpu__cfs_period_us=100_000)
    assert (cgroup.memory(), cgroup.processors()) == (7 * MIB, 0.5)


@pytest.mark.parametrize("path", ["/", "/docker/0123abcd", "/../outside", "/gone (deleted)"])
def test_in_a_container_the_root_is_the_group_also_when_the_path_is_the_hosts(group: Path, path: str) -> None:
    own(group, f"0::{path}\n")
    write(group, memory__max=10 * MIB, memory__current=4 * MIB, cpu__max="150000 100000")
    write(group.parent / "outside", memory__max=MIB, memory__current=MIB)
    assert (cgroup.memory(), cgroup.processors()) == (6 * MIB, 1.5)
