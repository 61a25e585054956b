"""`doctor --fix` unmounts what is dead, and nothing that lives (lazyfs.admin.dead_mounts)."""

import ctypes
import json
import os
import threading

import pytest

from lazyfs.admin import dead_mounts
from lazyfs.mount import kernel
from lazyfs.mount.client import mount_lock
from lazyfs.paths import state_dir

pytestmark = [pytest.mark.t1, pytest.mark.skipif(not kernel.may_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN")]


@pytest.fixture
def mountpoint(tmp_path, monkeypatch):
    """A folder that a record of the state folder names; whatever is mounted there is unmounted at the end."""
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(dead_mounts, "_ANSWER_S", 0.3)
    where = tmp_path / "mounted"
    where.mkdir()
    (state_dir("mounts") / "one.json").write_text(json.dumps({"mountpoint": str(where)}))
    (state_dir("mounts") / "torn.json").write_text("{")
    yield str(where)
    while kernel.mount_at(str(where)) is not None:
        kernel.unmount(str(where), lazy=True)


def mount(where):
    """Mount there; the mount is dead once the returned descriptor is closed, and hangs until then."""
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    kernel.mount_fuse(fd, where, "test")
    return fd


@pytest.mark.slow
def test_dead_ones_go_and_a_living_one_below_them_stays(mountpoint):
    living = mount(mountpoint)
    try:
        device = kernel.mount_at(mountpoint).device
        for _ in range(2):
            os.close(mount(mountpoint))
        assert dead_mounts.recorded_mount_points() == [mountpoint]
        assert dead_mounts.remove_dead(mountpoint)
        assert kernel.mount_at(mountpoint).device == device
        assert not dead_mounts.remove_dead(mountpoint)
    finally:
        os.close(living)


def test_what_a_launch_mounts_meanwhile_stays(mountpoint):
    """A launch that recovers the mount point holds its lock; afterwards the mount is looked at again."""
    os.close(mount(mountpoint))
    removed = []
    with mount_lock(mountpoint):
        fixing = threading.Thread(target=lambda: removed.append(dead_mounts.remove_dead(mountpoint)))
        fixing.start()
        kernel.unmount(mountpoint, lazy=True)
        living = mount(mountpoint)
        device = kernel.mount_at(mountpoint).device
    try:
        fixing.join(20)
        assert removed == [False]
        assert kernel.mount_at(mountpoint).device == device
    finally:
        os.close(living)


def test_a_mount_of_another_file_system_stays(mountpoint):
    os.close(mount(mountpoint))
    assert ctypes.CDLL(None).mount(b"tmpfs", os.fsencode(mountpoint), b"tmpfs", 0, b"size=4k") == 0
    assert not dead_mounts.remove_dead(mountpoint)
    assert kernel.mount_at(mountpoint).fstype == "tmpfs"
