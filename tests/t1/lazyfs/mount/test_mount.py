"""Real mounts: their contents, how they start and end, and that complete files are passed through."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lazyfs.api import find_mount, import_directory, unmount
from lazyfs.errors import Busy, LazyfsError, NotFound
from lazyfs.mount import client, kernel
from tests.kits.lazyfs.rig import (
    LIMIT_S,
    SIZES,
    assert_same,
    both,
    copied_namespace,
    is_daemon,
    wait_for,
)

pytestmark = [
    pytest.mark.t1,
    pytest.mark.skipif(not kernel.may_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]


@pytest.mark.parametrize(
    ("transport", "native", "use_origin"),
    [
        ("raw", "auto", True),
        ("raw", "auto", False),
        pytest.param("raw", "off", True, marks=pytest.mark.slow),
        pytest.param("raw", "off", False, marks=pytest.mark.slow),
        pytest.param("pyfuse3", "auto", True, marks=pytest.mark.slow),
        ("pyfuse3", "auto", False),
    ],
)
def test_a_mount_shows_every_byte_and_name(shared, rig, tmp_path, transport, native, use_origin):
    model, digest = shared
    handle = rig.mount(digest, transport=transport, native=native, use_origin=use_origin, cache_dir=tmp_path / "cache")
    reader = rig.reader()
    assert_same(reader, model, handle.mountpoint)
    listing = reader.ask("call", f"sorted(os.listdir({str(handle.mountpoint)!r}))")
    assert listing == sorted(os.listdir(model))
    assert reader.ask("call", f"os.readlink({str(handle.mountpoint / 'link')!r})") == "sub/tokenizer.json"
    status = handle.status()
    assert status["transport"] == transport
    assert status["counters"]["failed"] == 0
    if transport == "raw" and native == "auto":
        assert status["counters"]["native_opens"] > 0
    else:
        assert status["counters"]["native_opens"] == 0
    if native == "auto" and transport == "raw" and use_origin:
        assert status["counters"]["reads"] == 0
    handle.unmount(force=True)
    assert kernel.mount_at(str(handle.mountpoint)) is None
    assert not is_daemon(handle.pid)


@both
def test_operations_other_than_reading_have_their_errno(shared, rig, transport):
    _, digest = shared
    handle = rig.mount(digest, transport=transport)
    reader = rig.reader()
    m = str(handle.mountpoint)

    def number(expression):
        answer = reader.ask("call", expression)
        return answer["errno"] if isinstance(answer, dict) else answer

    assert number(f"os.open('{m}/none', os.O_RDONLY)") == errno.ENOENT
    assert number(f"os.open('{m}/config.json/x', os.O_RDONLY)") == errno.ENOTDIR
    assert number(f"os.open('{m}/{'x' * 300}', os.O_RDONLY)") == errno.ENAMETOOLONG
    assert number(f"os.open('{m}/config.json', os.O_WRONLY)") == errno.EROFS
    assert number(f"os.open('{m}/new', os.O_WRONLY | os.O_CREAT)") == errno.EROFS
    assert number(f"os.unlink('{m}/config.json')") == errno.EROFS
    assert number(f"os.mkdir('{m}/d')") == errno.EROFS
    assert number(f"os.rename('{m}/config.json', '{m}/x')") == errno.EROFS
    assert number(f"os.truncate('{m}/config.json', 0)") == errno.EROFS
    assert number(f"os.chmod('{m}/config.json', 0o777)") == errno.EROFS
    assert number(f"os.symlink('a', '{m}/s')") == errno.EROFS
    assert number(f"os.setxattr('{m}/config.json', 'user.a', b'1')") == errno.EROFS
    assert number(f"os.getxattr('{m}/config.json', 'user.none')") == errno.ENODATA
    assert number(f"os.readlink('{m}/config.json')") == errno.EINVAL
    assert number(f"os.read(os.open('{m}/sub', os.O_RDONLY), 1)") == errno.EISDIR
    assert number(f"os.pread(os.open('{m}/config.json', os.O_RDONLY), 10, 1 << 40).hex()") == ""
    assert number(f"os.fsync(os.open('{m}/config.json', os.O_RDONLY))") is None
    assert number(f"os.fsync(os.open('{m}/sub', os.O_RDONLY))") is None


@both
def test_extended_attributes(shared, rig, tmp_path, transport):
    _, digest = shared
    handle = rig.mount(
        digest, transport=transport, use_origin=False, cache_dir=tmp_path / "c", background_mb_s=0.0, prefetch=False
    )
    reader, path = rig.reader(), str(handle.mountpoint / "model.safetensors")
    names = reader.ask("call", f"os.listxattr({path!r})")
    assert names == ["user.quickthaw.digest", "user.quickthaw.chunks", "user.quickthaw.cached"]
    share = f"os.getxattr({path!r}, 'user.quickthaw.cached').decode()"
    assert reader.ask("call", share) == "0.0000"
    reader.ask("digest", path)
    assert reader.ask("call", share) == "1.0000"
    assert len(reader.ask("call", f"os.getxattr({path!r}, 'user.quickthaw.digest').decode()")) == 64
    top = f"os.getxattr({str(handle.mountpoint)!r}, 'user.quickthaw.manifest').decode()"
    assert reader.ask("call", top) == digest


@both
def test_mounting_again_returns_the_same_mount(shared, rig, tmp_path, transport):
    _, digest = shared
    first = rig.mount(digest, transport=transport)
    assert rig.mount(digest, transport=transport).pid == first.pid
    assert find_mount(tmp_path / "mnt").pid == first.pid
    with pytest.raises(Busy) as caught:
        rig.mount("0" * 64)
    assert caught.value.code == "mounted-otherwise"


def test_concurrent_mounts_start_one_daemon(shared, rig):
    _, digest = shared
    pids, failures = [], []

    def go():
        try:
            pids.append(rig.mount(digest).pid)
        except LazyfsError as error:
            failures.append(error)

    threads = [threading.Thread(target=go) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(LIMIT_S)
    assert not failures and len(pids) == 6 and len(set(pids)) == 1


@both
def test_a_killed_daemon_is_replaced(shared, rig, transport):
    model, digest = shared
    first = rig.mount(digest, transport=transport)
    os.kill(first.pid, signal.SIGKILL)
    reader = rig.reader()
    wait_for(lambda: not is_daemon(first.pid))
    # The process is gone a moment before its connection is: a request in between is aborted.
    answer = reader.ask("call", f"os.listdir({str(first.mountpoint)!r})")
    assert answer in ({"errno": errno.ENOTCONN}, {"errno": errno.ECONNABORTED})
    second = rig.mount(digest, transport=transport)
    assert second.pid != first.pid
    assert_same(reader, model, second.mountpoint)


@pytest.mark.slow
def test_a_stopped_daemon_is_replaced(shared, rig, monkeypatch):
    _, digest = shared
    monkeypatch.setattr("lazyfs.mount.client._PING_S", 0.3)
    first = rig.mount(digest)
    os.kill(first.pid, signal.SIGSTOP)
    second = rig.mount(digest)
    assert second.pid != first.pid and not is_daemon(first.pid)


@pytest.mark.slow
@both
def test_unmounting_removes_mount_and_daemon(shared, rig, tmp_path, transport):
    _, digest = shared
    handle = rig.mount(digest, native="off", transport=transport)
    reader = rig.reader()
    assert reader.ask("open", "f", str(handle.mountpoint / "config.json")) is True
    with pytest.raises(Busy):
        handle.unmount()
    assert handle.status()["open_files"] == 1
    handle.unmount(force=True)
    assert not is_daemon(handle.pid)
    with pytest.raises(NotFound):
        unmount(tmp_path / "mnt")
    with pytest.raises(NotFound):
        handle.status()
    leftovers = [p.name for p in handle.socket.parent.parent.glob("mounts/*.json")]
    assert not handle.socket.exists() and not leftovers


@pytest.mark.slow
@both
def test_a_mount_used_in_another_namespace_survives_unmounting(shared, rig, tmp_path, transport):
    """As an engine's sandbox does: it binds the mount into its own namespace, and the host unmounts."""
    model, digest = shared
    # Shorter than the last wait below, because a sandbox of another test may have copied the mount, too.
    first = rig.mount(digest, transport=transport, orphan_exit_s=30.0)
    (tmp_path / "inner").mkdir()
    script = f"""
import os, sys
sys.stdin.readline()
data = open({str(tmp_path / "inner" / "config.json")!r}).read()
print(data, flush=True)
"""
    inner = subprocess.Popen(
        [
            "unshare", "-m", "--propagation", "private", "sh", "-c",
            f"mount --bind {first.mountpoint} {tmp_path / 'inner'} && echo bound && exec {sys.executable} -c \"$0\"",
            script,
        ],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert inner.stdout.readline() == "bound\n"
        assert first.unmount(limit_s=0.5) is False
        second = rig.mount(digest, transport=transport)
        assert second.pid != first.pid and is_daemon(first.pid)
        out, _ = inner.communicate("go\n", timeout=LIMIT_S)
        assert out == (model / "config.json").read_text() + "\n"
    finally:
        inner.kill()
        inner.wait(LIMIT_S)
    wait_for(lambda: not is_daemon(first.pid))
    assert find_mount(first.mountpoint).pid == second.pid


@pytest.mark.slow
@both
def test_copies_in_other_sandboxes_do_not_keep_an_idle_mount(shared, rig, transport):
    """Where mounts are private, as in a container, a sandbox keeps a copy of each, which it does not read."""
    _, digest = shared
    handle = rig.mount(digest, transport=transport, idle_exit_s=1.0, orphan_exit_s=3600.0)
    with copied_namespace():
        handle.unmount()
        wait_for(lambda: not is_daemon(handle.pid))


@both
def test_a_mount_ends_at_once_with_an_unresponsive_fetcher(shared, rig, transport):
    """It is stopped, blocked by a disk, or still being started on a busy host."""
    _, digest = shared
    handle = rig.mount(digest, transport=transport, use_origin=False, orphan_exit_s=0.1)
    fetcher = rig.fetcher_of(handle)
    os.kill(fetcher, signal.SIGSTOP)
    started = time.monotonic()
    handle.unmount()
    wait_for(lambda: not is_daemon(handle.pid))
    assert time.monotonic() - started < 5
    wait_for(lambda: not os.path.exists(f"/proc/{fetcher}/exe"))


@pytest.mark.parametrize("kept", [True, False])
def test_unmounting_waits_for_a_slow_daemon(shared, rig, monkeypatch, kept):
    """On a busy host its end takes more than the second allowed for a mount that another namespace keeps."""
    _, digest = shared
    limits = []
    monkeypatch.setattr(client, "_gone", lambda pid, limit_s: limits.append(limit_s) or True)
    monkeypatch.setattr(kernel, "exists", lambda device: kept)
    rig.mount(digest).unmount(limit_s=7.0)
    assert limits == [client._END_S if kept else 7.0]


@pytest.mark.slow
def test_a_mount_exists_while_any_namespace_has_it(shared, rig):
    _, digest = shared
    handle = rig.mount(digest, orphan_exit_s=1.0)
    device = kernel.mount_at(str(handle.mountpoint)).device
    with copied_namespace():
        kernel.unmount(str(handle.mountpoint))
        assert kernel.exists(device)
    wait_for(lambda: not is_daemon(handle.pid))
    # Unless another test has mounted meanwhile and got the same number.
    wait_for(lambda: not kernel.exists(device))


@both
@pytest.mark.slow
def test_an_idle_mount_unmounts_itself(shared, rig, transport):
    _, digest = shared
    handle = rig.mount(digest, transport=transport, idle_exit_s=0.2, orphan_exit_s=0.2)
    wait_for(lambda: kernel.mount_at(str(handle.mountpoint)) is None)
    wait_for(lambda: not is_daemon(handle.pid))


@both
@pytest.mark.slow
@pytest.mark.parametrize("how", ["idle", "unmount", "signal"])
def test_a_mount_whose_folder_was_renamed_ends_like_any_other(shared, rig, tmp_path, transport, how):
    _, digest = shared
    handle = rig.mount(digest, "before/mnt", transport=transport, idle_exit_s=0.5 * (how == "idle"))
    (tmp_path / "before").rename(tmp_path / "after")
    moved = str(tmp_path / "after" / "mnt")
    try:
        if how == "unmount":
            assert handle.unmount(limit_s=LIMIT_S) is True
        elif how == "signal":
            os.kill(handle.pid, signal.SIGTERM)
        wait_for(lambda: not is_daemon(handle.pid))
        assert kernel.mount_at(moved) is None
        assert os.listdir(moved) == []
    finally:
        if kernel.mount_at(moved) is not None:
            kernel.unmount(moved, lazy=True)


def test_a_daemon_that_ends_without_an_unmount_takes_its_mount_along(shared, rig, tmp_path):
    """Its name was given up while its folder was elsewhere, so nobody asks it to unmount."""
    _, digest = shared
    handle = rig.mount(digest, "before/mnt", orphan_exit_s=0.2)
    (tmp_path / "before").rename(tmp_path / "after")
    moved = str(tmp_path / "after" / "mnt")
    try:
        assert find_mount(handle.mountpoint) is None  # and tells the daemon so
        wait_for(lambda: not is_daemon(handle.pid))
        assert kernel.mount_at(moved) is None
    finally:
        if kernel.mount_at(moved) is not None:
            kernel.unmount(moved, lazy=True)


def test_a_daemon_whose_connection_was_aborted_takes_its_mount_along(shared, rig):
    _, digest = shared
    handle = rig.mount(digest, transport="raw")
    assert kernel.abort(kernel.mount_at(str(handle.mountpoint)).device)
    wait_for(lambda: not is_daemon(handle.pid))
    assert kernel.mount_at(str(handle.mountpoint)) is None


@pytest.mark.slow
@pytest.mark.parametrize("how", ["idle", "signal"])
def test_a_daemon_whose_mount_is_gone_here_leaves_the_next_ones_alone(shared, rig, how):
    """Another namespace keeps its mount, so it still serves when a new daemon mounts at the same path."""
    _, digest = shared
    first = rig.mount(digest, idle_exit_s=2.0 * (how == "idle"), orphan_exit_s=LIMIT_S)
    with copied_namespace():
        kernel.unmount(str(first.mountpoint))
        second = rig.mount(digest)
        assert second.pid != first.pid
        if how == "signal":
            os.kill(first.pid, signal.SIGTERM)
            wait_for(lambda: "cannot unmount on a signal" in first.log_file.read_text())
        else:
            wait_for(lambda: not is_daemon(first.pid))
        assert kernel.mount_at(str(second.mountpoint)) is not None and is_daemon(second.pid)


def test_mounting_an_unknown_manifest_fails(rig, shared, tmp_path):
    with pytest.raises(NotFound) as caught:
        rig.mount("0" * 64)
    assert "weights ls" in str(caught.value)
    assert kernel.mount_at(str(tmp_path / "mnt")) is None


@both
@pytest.mark.slow
def test_a_forced_unmount_ends_a_read_with_an_error(shared, rig, tmp_path, transport):
    """A reader in the middle of a file gets an error at once, and the daemon ends."""
    _, digest = shared
    handle = rig.mount(digest, transport=transport, native="off", cache_dir=tmp_path / "c", use_origin=False)
    reader, path = rig.reader(), handle.mountpoint / "model.safetensors"
    assert reader.ask("open", "m", str(path)) is True
    reader.ask("pread", "m", 0, 10)
    with pytest.raises(Busy):
        handle.unmount()
    assert handle.unmount(force=True) is True
    assert not is_daemon(handle.pid)
    size = sum(SIZES)
    answers = [reader.ask("pread", "m", place, 4096) for place in range(0, size, 1 << 20)]
    failed = [a for a in answers if isinstance(a, dict)]
    # The kernel's page cache is still right; all other reads fail without waiting.
    assert failed and {a["errno"] for a in failed} <= {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO}
    assert kernel.mount_at(str(handle.mountpoint)) is None


@pytest.mark.slow
def test_direct_reads_of_any_alignment(shared, rig, tmp_path):
    """O_DIRECT bypasses the page cache: offsets and lengths reach the daemon unchanged, and need more pages than fit."""
    model, digest = shared
    handle = rig.mount(digest, transport="raw", native="off", cache_dir=tmp_path / "c", use_origin=False)
    reader, path = rig.reader(), str(handle.mountpoint / "model.safetensors")
    data = (model / "model.safetensors").read_bytes()
    for place, length in ((0, 4096), (1, 1 << 20), (4095, (1 << 20) + 1), (70_001, 3 << 20), (len(data) - 5, 4096)):
        call = f"os.pread(os.open({path!r}, os.O_RDONLY | os.O_DIRECT), {length}, {place}).hex()"
        got = bytes.fromhex(reader.ask("call", call))
        assert got == data[place : place + len(got)] and len(got) > 0
        assert len(got) == min(length, len(data) - place) or length > 1 << 20


@pytest.mark.slow
def test_an_uncached_sparse_file_is_read_from_disk(shared, rig, tmp_path):
    """Its pages are dropped from memory: the same bytes, for any number of concurrent readers."""
    model, digest = shared
    cache = tmp_path / "c"
    handle = rig.mount(digest, transport="raw", native="off", cache_dir=cache, use_origin=False)
    wait_for(lambda: handle.status()["cached_bytes"] == handle.status()["bytes"])
    for path in cache.glob("images/*/*/data"):
        with open(path, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    readers, data = [rig.reader() for _ in range(4)], (model / "model.safetensors").read_bytes()
    for number, reader in enumerate(readers):
        assert reader.ask("open", "m", str(handle.mountpoint / "model.safetensors")) is True
        reader.send("pread", "m", number * (4 << 20), 2 << 20)
    for number, reader in enumerate(readers):
        assert reader.receive() == data[number * (4 << 20) :][: 2 << 20].hex()


def test_a_mount_over_another_file_system_is_refused(shared, rig, tmp_path):
    _, digest = shared
    (tmp_path / "mnt").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path / "mnt"], check=True, timeout=LIMIT_S)
    try:
        with pytest.raises(Busy):
            rig.mount(digest)
    finally:
        subprocess.run(["umount", tmp_path / "mnt"], check=True, timeout=LIMIT_S)


@pytest.mark.slow
def test_a_mount_of_another_home_is_not_touched(rig, tmp_path, shared, monkeypatch):
    _, digest = shared
    first = rig.mount(digest)
    store = first.store_url
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path / "another"))
    with pytest.raises(Busy) as caught:
        rig.mount(digest, store_url=store)
    assert caught.value.code == "mounted-otherwise"
    assert is_daemon(first.pid) and rig.reader().ask("call", f"os.listdir({str(first.mountpoint)!r})")
    os.kill(first.pid, signal.SIGKILL)
    wait_for(lambda: not is_daemon(first.pid))
    assert rig.mount(digest, store_url=store).pid != first.pid


def test_a_mount_point_can_be_a_symlink(shared, rig, tmp_path):
    """One mount under either name, also once its daemon has ended and the path does not answer."""
    _, digest = shared
    (tmp_path / "deep").mkdir()
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("deep/../deep/mnt")
    first = rig.mount(digest, "one")
    assert first.mountpoint == tmp_path / "deep" / "mnt"
    assert rig.mount(digest, "deep/mnt").pid == first.pid == find_mount(tmp_path / "two").pid
    os.kill(first.pid, signal.SIGKILL)
    wait_for(lambda: not is_daemon(first.pid))
    second = rig.mount(digest, "one")
    assert second.pid != first.pid
    unmount(tmp_path / "one")
    assert kernel.mount_at(str(first.mountpoint)) is None
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(LazyfsError) as caught:
        rig.mount(digest, "a")
    assert caught.value.code == "usage"


@pytest.mark.slow
def test_a_thousand_files(rig, tmp_path, shared):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(1000):
        (folder / f"f{i:04}").write_text(f"file {i}")
    digest = import_directory(folder)
    started = time.monotonic()
    handle = rig.mount(digest, use_origin=False, cache_dir=tmp_path / "c")
    reader = rig.reader()
    assert reader.ask("call", f"open('{handle.mountpoint}/f0777').read()") == "file 777"
    assert time.monotonic() - started < LIMIT_S
    assert reader.ask("call", f"len(os.listdir('{handle.mountpoint}'))") == 1000
