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


def everything(**less):
    return Privileges(effective=(1 << 41) - 1, **less)


def test_under_a_seccomp_filter_snapshots_are_restored_and_none_is_taken():
    found = capabilities.from_privileges(everything(seccomp=True))
    assert found.snapshots is None and "seccomp=unconfined" in (found.new_snapshots or "")
    assert list(found.off()) == ["new snapshots"]


def test_a_filter_that_forbids_page_faults_is_named_with_them():
    found = capabilities.from_privileges(everything(seccomp=True, page_faults=False))
    assert list(found.off()) == ["new snapshots, pages on demand"]


def test_without_capabilities_one_line_names_everything():
    found = capabilities.from_privileges(Privileges(effective=0, seccomp=True, page_faults=False))
    assert found.off() == {"lazy weights, sandbox, snapshots": found.new_snapshots}
    assert "CAP_SYS_PTRACE" in (found.snapshots or "") and "seccomp=unconfined" in (found.snapshots or "")
