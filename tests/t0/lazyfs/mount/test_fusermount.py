"""fusermount3 that does not end, or hands a descriptor over and then does not end: a refusal in time, and nothing left."""

from __future__ import annotations

import os
import sys
import time

import pytest

from lazyfs.errors import HostLacks
from lazyfs.mount import kernel

pytestmark = pytest.mark.t0
SILENT = "time.sleep(60)"
HANDS_OVER = """
import os, socket
ours = socket.socket(fileno=int(os.environ["_FUSE_COMMFD"]))
socket.send_fds(ours, [b"1"], [os.open("/dev/null", os.O_RDONLY)])
time.sleep(60)
"""


@pytest.fixture
def helper(tmp_path, monkeypatch):
    """Return a function that lets `fusermount3` be a program in Python."""
    monkeypatch.setattr(kernel, "_HELPER_S", 0.5)
    monkeypatch.setattr(kernel, "may_mount", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def program(code: str) -> None:
        path = tmp_path / "fusermount3"
        path.write_text(f"#!{sys.executable} -IS\nimport time\n{code}\n")
        path.chmod(0o755)

    return program


@pytest.mark.slow
@pytest.mark.parametrize("code", [SILENT, HANDS_OVER])
def test_a_mount_waits_for_the_helper_within_a_limit_and_keeps_no_descriptor(helper, tmp_path, code):
    helper(code)
    before, began = os.listdir("/proc/self/fd"), time.monotonic()
    with pytest.raises(HostLacks, match="did not end in time"):
        kernel.connect(str(tmp_path), "quickthaw:0")
    assert time.monotonic() - began < 30 and os.listdir("/proc/self/fd") == before


@pytest.mark.slow
def test_an_unmount_waits_for_the_helper_within_a_limit(helper, tmp_path):
    helper(SILENT)
    with pytest.raises(HostLacks, match="did not end in time"):
        kernel._fusermount(str(tmp_path), lazy=True)


@pytest.mark.parametrize("there", [True, False])
def test_a_helper_that_is_missing_or_not_for_this_user_is_said_in_one_line(helper, tmp_path, monkeypatch, there):
    if there:
        helper(SILENT)
        (tmp_path / "fusermount3").chmod(0o600)
    monkeypatch.setenv("PATH", str(tmp_path))
    why = "Permission denied" if there else "No such file"
    with pytest.raises(HostLacks, match=f"cannot mount .*{why}.*; run as root, or install fuse3$"):
        kernel.connect(str(tmp_path), "quickthaw:0")
    with pytest.raises(HostLacks, match=f"cannot unmount .*{why}.*; run as root, or install fuse3$"):
        kernel._fusermount(str(tmp_path), lazy=True)
