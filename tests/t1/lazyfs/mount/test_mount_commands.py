"""The command line and the control socket of a mount."""

from __future__ import annotations

import errno
import json
import os
import pty
import signal
import subprocess
import sys

import pytest

from lazyfs.api import find_mount
from lazyfs.errors import LazyfsError, NotFound
from lazyfs.mount import kernel
from lazyfs.mount.client import no_mount_error
from lazyfs.mount.control import ask
from tests.kits.lazyfs.rig import (
    LIMIT_S,
    ROOT,
    SIZES,
    both,
    wait_for,
    write_model,
)

pytestmark = [
    pytest.mark.t1,
    pytest.mark.skipif(not kernel.may_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]


COMMAND = "import click; from lazyfs.cli.mount import mount; from lazyfs.cli.weights import weights\nclick.Group(commands={'weights': weights, 'mount': mount})()"


def run(*arguments, code=0):
    """Run `quickthaw weights …` or `quickthaw mount …`; assert its exit code."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        capture_output=True, text=True, timeout=LIMIT_S, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.slow
def test_a_stopped_daemon_is_named(shared, rig, monkeypatch):
    monkeypatch.setattr("lazyfs.mount.client._PING_S", 0.2)
    _, digest = shared
    handle = rig.mount(digest)
    assert no_mount_error(rig.tmp / "elsewhere").code == "not-found"
    os.kill(handle.pid, signal.SIGSTOP)
    try:
        assert find_mount(handle.mountpoint) is None
        reason = no_mount_error(handle.mountpoint)
        assert reason.code == "daemon-silent" and str(handle.pid) in str(reason)
    finally:
        os.kill(handle.pid, signal.SIGCONT)


@both
def test_the_control_socket(shared, rig, tmp_path, transport):
    _, digest = shared
    cache = tmp_path / "c"
    handle = rig.mount(
        digest, use_origin=False, cache_dir=cache, transport=transport, background_mb_s=0.0, prefetch=False
    )
    assert handle.status()["cached_bytes"] == 0
    assert handle.control("prefetch", path="model.safetensors")["absent_chunks"] > 3
    wait_for(lambda: handle.status()["cached_bytes"] >= sum(SIZES))
    assert handle.control("prefetch", path="model.safetensors")["absent_bytes"] == 0
    assert (handle.socket.stat().st_mode & 0o777) == 0o600
    for bad in ({"op": "nonsense"}, {"op": "prefetch", "path": "none"}):
        with pytest.raises(LazyfsError) as caught:
            ask(handle.socket, bad)
        assert caught.value.code == "usage"
    assert handle.control("pin")["files"] == 4
    assert handle.control("drop")["files"] == 4
    wait_for(lambda: handle.status()["cached_bytes"] == 0)
    with pytest.raises(NotFound):
        ask(tmp_path / "nobody.sock", {"op": "ping"})


@pytest.mark.slow
def test_the_command_line_prefetches_pins_and_drops(shared, rig, tmp_path):
    _, digest = shared
    cache = tmp_path / "c"
    handle = rig.mount(digest, use_origin=False, cache_dir=cache, background_mb_s=0.0, prefetch=False)
    mnt = handle.mountpoint
    size = (mnt / "config.json").stat().st_size
    asked = {"files": 1, "in_place": 0, "absent_chunks": 1, "absent_bytes": size}
    assert json.loads(run("mount", "--pin", mnt / "config.json", "--json").stdout) == asked
    assert run("mount", "--prefetch", mnt).stdout.startswith("files: 4  in_place: 0  absent_chunks: ")
    wait_for(lambda: handle.status()["cached_bytes"] == handle.status()["bytes"])
    assert json.loads(run("mount", "--drop", mnt, "--json").stdout)["files"] == 4
    wait_for(lambda: handle.status()["cached_bytes"] == 0)
    assert "quickthaw: usage: " in run("mount", "--prefetch", mnt / "none", code=1).stderr
    assert "quickthaw: not-found: " in run("mount", "--drop", tmp_path, code=1).stderr


@pytest.mark.slow
def test_the_command_line(shared, tmp_path):
    _, digest = shared
    assert digest in run("weights", "ls", "--json").stdout
    mnt = tmp_path / "m"
    try:
        answer = json.loads(run("mount", digest[:12], mnt, "--detach", "--json").stdout)
        assert answer["manifest"] == digest
        assert json.loads(run("mount", "--status", mnt, "--json").stdout)["pid"] == answer["pid"]
    finally:
        run("mount", "--unmount", mnt, "--force")
    refused = run("mount", "nothing-like-it", mnt, code=1)
    assert refused.stderr.count("\n") == 1 and "quickthaw: not-found: " in refused.stderr
    assert "quickthaw: not-found: " in run("weights", "import", tmp_path / "none", code=1).stderr
    run("mount", code=2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_foreground_mount_ends_with_its_terminal(shared, tmp_path, number):
    _, digest = shared
    mnt = tmp_path / "m"
    # If the tests run under nohup, the signal would rightly be ignored.
    foreground = subprocess.Popen(
        ["env", "--default-signal=HUP", sys.executable, "-c", COMMAND, "mount", digest, str(mnt)],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        assert foreground.stdout.readline().startswith("ready: ")
        foreground.send_signal(number)
        assert foreground.wait(LIMIT_S) == 0
    finally:
        foreground.kill()
        foreground.stdout.close()
    assert kernel.mount_at(str(mnt)) is None


@pytest.mark.slow
def test_an_import_shows_its_progress_on_a_terminal(shared, tmp_path):
    model = write_model(tmp_path / "own", [5 << 20, 4 << 20], seed=4)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", COMMAND, "weights", "import", str(model), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, cwd=ROOT, text=True)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError as error:
        # The error of a terminal's reading end when the last writer has closed it.
        assert error.errno == errno.EIO
    finally:
        os.close(ours)
    out, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0 and json.loads(out)["bytes"] > 9 << 20
    shares = [float(line.split(b"%")[0]) for line in shown.split(b"\r") if b"%" in line]
    assert len(shares) >= 2 and shares == sorted(shares) and shares[-1] == 100.0 and b" of 9.5 MB" in shown
