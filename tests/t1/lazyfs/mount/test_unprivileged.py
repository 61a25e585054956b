"""Mounts of a user without privileges: the raw transport on the descriptor that fusermount3 hands over."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.kits.lazyfs import unprivileged

pytestmark = [
    pytest.mark.t1,
    pytest.mark.slow,
    pytest.mark.skipif(not unprivileged.possible(), reason="needs root, /dev/fuse and fusermount3"),
]
BEGIN = r"""
import os, signal, subprocess, sys, time
from pathlib import Path
assert os.getuid() != 0
from lazyfs.admin.dead_mounts import remove_dead
from lazyfs.api import import_directory, mount
from lazyfs.errors import Busy, HostLacks
from lazyfs.mount import kernel
from tests.kits.lazyfs.models import make_model
assert not kernel.may_mount()
folder = Path(sys.argv[1])
where, model = folder / "mnt", make_model(folder / "model", megabytes=20)
digest = import_directory(model)

def read(name="model.safetensors"):  # from another process: a dead mount must not stop this one
    code = "import hashlib, sys; print(hashlib.blake2b(open(sys.argv[1], 'rb').read()).hexdigest())"
    return subprocess.run([sys.executable, "-c", code, where / name], capture_output=True, text=True, timeout=60)

def digest_of(path):
    import hashlib
    return hashlib.blake2b(path.read_bytes()).hexdigest()

def ended(pid, limit_s=30):
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False

def shown():
    return kernel.mount_at(str(where))

def assert_same():
    for path in (p for p in model.rglob("*") if p.is_file()):
        name = path.relative_to(model)
        assert read(name).stdout.strip() == digest_of(path), name
"""


@pytest.fixture
def folder():
    # Not tmp_path: every folder above it is for its user only, and fusermount3 goes to the mount point as ours.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="qt-user-") as name:
        yield Path(name)


def run(code, folder, **more):
    return unprivileged.run(BEGIN + code, folder, str(folder), **more)


def test_every_byte_is_served_by_the_raw_transport_and_the_mount_ends_cleanly(folder):
    code = """
for settings in ({}, {"use_origin": False}, {"transport": "raw", "use_origin": False, "native": "off"}):
    handle = mount(digest, where, **settings)
    status = handle.status()
    assert status["transport"] == "raw" and status["passthrough"] is False, status
    entry = shown()
    assert entry.fstype == kernel.FSTYPE and entry.source.startswith("quickthaw:") and f"user_id={os.getuid()}" in entry.options
    assert_same()
    assert os.statvfs(where).f_flag & os.ST_RDONLY
    handle.unmount()
    assert shown() is None and ended(handle.pid)
print("done")
"""
    assert run(code, folder) == "done\n"


def test_pyfuse3_is_there_when_asked_for_by_name(folder):
    code = """
handle = mount(digest, where, transport="pyfuse3", use_origin=False)
assert handle.status()["transport"] == "pyfuse3"
assert_same()
handle.unmount()
assert shown() is None and ended(handle.pid)
"""
    run(code, folder)


def test_a_killed_daemon_leaves_a_dead_mount_which_the_next_mount_and_doctor_remove(folder):
    code = """
handle = mount(digest, where, use_origin=False)
os.kill(handle.pid, signal.SIGKILL)
assert ended(handle.pid) and shown() is not None and read().returncode != 0
again = mount(digest, where, use_origin=False)
assert again.pid != handle.pid
assert_same()
assert sum(entry.mountpoint == str(where) for entry in kernel.mount_table()) == 1
os.kill(again.pid, signal.SIGKILL)
assert ended(again.pid)
assert remove_dead(str(where)) and shown() is None and not remove_dead(str(where))
"""
    run(code, folder)


def test_a_mount_in_use_is_not_unmounted_without_force_and_a_signal_unmounts(folder):
    code = """
handle = mount(digest, where, use_origin=False)
with subprocess.Popen(["sleep", "60"], cwd=where) as user:
    try:
        handle.unmount()
        raise SystemExit("unmounted under its user")
    except Busy:
        pass
    assert shown() is not None
    handle.unmount(force=True)
    assert shown() is None
    user.kill()
assert ended(handle.pid)
handle = mount(digest, where)
os.kill(handle.pid, signal.SIGTERM)
assert ended(handle.pid) and shown() is None
handle = mount(digest, where, idle_exit_s=0.5)
assert ended(handle.pid) and shown() is None
"""
    run(code, folder)


def test_two_users_of_one_mount_point_share_its_daemon_and_a_hung_one_is_replaced(folder):
    code = """
handle = mount(digest, where, use_origin=False)
assert mount(digest, where, use_origin=False).pid == handle.pid
os.kill(handle.pid, signal.SIGSTOP)
again = mount(digest, where, use_origin=False)
assert again.pid != handle.pid and ended(handle.pid)
assert_same()
again.unmount()
assert shown() is None
"""
    run(code, folder)


def test_what_needs_a_privilege_is_refused_in_one_line_with_the_remedy(folder):
    code = """
for settings, remedy in (({"native": "passthrough"}, "run as root"), ({"allow_other": True}, "user_allow_other")):
    try:
        mount(digest, where, **settings)
        raise SystemExit("mounted")
    except HostLacks as error:
        assert remedy in str(error) and len(str(error).splitlines()) == 1, error
    assert shown() is None
os.environ["PATH"] = "/nowhere"
try:
    mount(digest, where)
    raise SystemExit("mounted")
except HostLacks as error:
    assert "install fuse3" in str(error), error
"""
    run(code, folder)


def test_others_may_read_where_fuse_conf_allows_it(folder):
    code = """
handle = mount(digest, where, allow_other=True)
assert "allow_other" in shown().options
assert_same()
handle.unmount()
"""
    run(code, folder, allow_other=True)
