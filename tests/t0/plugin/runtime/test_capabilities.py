"""What a host can do, where the notes about it cannot be kept."""

import errno
from pathlib import Path

import pytest

from checkpoint.errors import HostLacks
from checkpoint.sandbox.privileges import Privileges
from plugin.runtime import capabilities

pytestmark = pytest.mark.t0


def test_a_refused_sandbox_is_named_where_the_state_folder_is_read_only(tmp_path, monkeypatch):
    def refuse():
        raise HostLacks("sandbox-run-dir", "no folder here")

    def read_only(path, missing_ok=False):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(capabilities, "make_run_dir", refuse)
    monkeypatch.setattr(Path, "unlink", read_only)
    privileges = Privileges(effective=(1 << 41) - 1)
    assert "sandbox-run-dir: no folder here" in (capabilities._sandbox(tmp_path, privileges, True) or "")
