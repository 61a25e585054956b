"""The UNIX socket of a launch: which file there is one that a killed launch left."""

import fcntl
import os
import socket

import pytest

from launchers.errors import Usage
from plugin.runtime import listening

pytestmark = pytest.mark.t0


@pytest.fixture
def left(tmp_path):
    """A socket that no process has any more."""
    path = tmp_path / "own" / "engine.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    return path


def test_a_socket_of_the_same_name_in_another_folder_is_another(left, tmp_path):
    (tmp_path / "other").mkdir()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "other" / left.name))
        with listening.bind_unix(left) as sock:
            assert sock.getsockname() == str(left)


def test_one_that_may_be_the_same_by_another_name_is_left_alone(left, tmp_path, monkeypatch):
    """A process with other folders has bound it."""
    listed = tmp_path / "unix"
    listed.write_text(f"Num\n0000: 00000002 00000000 00000000 0001 01 1 /not/here/{left.name}\n")
    monkeypatch.setattr(listening, "_BOUND", listed)
    with pytest.raises(Usage, match="another process listens there"):
        listening.bind_unix(left)
    assert left.exists()


def test_a_folder_that_others_keep_locked_does_not_stop_a_launch(left, monkeypatch):
    monkeypatch.setattr(listening, "_LOCK_S", 0.01)
    fd = os.open(left.parent, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with listening.bind_unix(left.parent / "new"):
            pass
        with pytest.raises(Usage):  # another launch may be about to replace it
            listening.bind_unix(left)
    finally:
        os.close(fd)
