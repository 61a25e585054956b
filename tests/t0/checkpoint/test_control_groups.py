"""Which control groups this process is in, by what /proc says, and whether GPU contents fit into the memory that they leave."""

import pytest

from checkpoint.control_groups import Group, groups
from checkpoint.errors import Failed
from checkpoint.snapshot.free_space import check_memory

pytestmark = pytest.mark.t0


@pytest.fixture
def proc(tmp_path):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    for folder in ("unified/pod/engine", "cpu/pod"):
        (tmp_path / "groups" / folder).mkdir(parents=True)
    return tmp_path / "proc"


def write(proc, cgroup, *mounts):
    (proc / "self" / "cgroup").write_text(cgroup)
    lines = (f"3{number} 31 0:28 {mount}\n" for number, mount in enumerate(mounts))
    (proc / "self" / "mountinfo").write_text("".join(lines))


def test_a_hybrid_host_has_a_group_of_each_version(proc):
    top = proc.parent / "groups"
    write(
        proc,
        "4:name=systemd:/pod\n3:cpu,cpuacct:/pod\n0::/pod/engine\n",
        f"/ {top / 'cpu'} rw shared:7 - cgroup cgroup rw,cpu,cpuacct",
        f"/ {top / 'unified'} rw - cgroup2 cgroup2 rw",
    )
    own = Group(top / "unified" / "pod" / "engine", top / "unified")
    assert list(groups("cpu", proc)) == [Group(top / "cpu" / "pod", top / "cpu", 1), own]
    assert list(groups(proc=proc)) == [own]
    assert [folder.name for folder in own.and_above()] == ["engine", "pod", "unified"]


@pytest.mark.parametrize(
    ("path", "root", "folder", "own"),
    [
        ("/host/abc", "/host/abc", ".", True),  # a container that sees the host's paths, and its own group only
        ("/host/abc/pod", "/host/abc", "pod", True),
        ("/host/other", "/host/abc", ".", False),
        ("/../pod", "/", ".", False),  # outside the control group namespace
        ("/gone", "/", ".", False),
    ],
)
def test_a_group_that_is_not_mounted_is_not_this_processs_own(proc, path, root, folder, own):
    top = proc.parent / "groups" / "unified"
    write(proc, f"0::{path}\n", f"{root} {top} rw - cgroup2 cgroup2 rw")
    assert list(groups(proc=proc)) == [Group(top / folder, top, own=own)]


def test_without_a_mount_there_is_no_group(proc):
    write(proc, "0::/pod\n", "/ /sys rw - sysfs sysfs rw")
    assert list(groups(proc=proc)) == []


def test_a_dump_needs_room_in_the_group_for_what_is_on_the_gpu(proc):
    (proc / "meminfo").write_text("MemTotal: 64000000 kB\nMemAvailable: 60000000 kB\n")
    top = proc.parent / "groups" / "unified"
    write(proc, "0::/pod/engine\n", f"/ {top} rw - cgroup2 cgroup2 rw")
    check_memory(10 << 30, proc)
    for name, text in (("max", 4 << 30), ("current", 3 << 30), ("stat", f"inactive_file {1 << 20}")):
        (top / "pod" / f"memory.{name}").write_text(str(text))
    check_memory(512 << 20, proc)
    with pytest.raises(Failed, match="GPU memory into host memory") as failed:
        check_memory(1 << 30, proc)
    assert failed.value.code == "host-memory-short"
