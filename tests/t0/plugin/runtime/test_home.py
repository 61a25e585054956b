"""The state folder: whose it is, who else may enter it, and what makes it unusable."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from lazyfs.paths import state_folder
from plugin.runtime import home

pytestmark = pytest.mark.t0


def mode(folder: Path) -> int:
    return folder.stat().st_mode & 0o777


@pytest.mark.parametrize("entries", [(), ("snapshots", "run", "model-digests.json", ".setup-vllm")])
def test_a_folder_of_our_own_is_closed_without_a_word(tmp_path: Path, entries: tuple[str, ...]) -> None:
    for name in entries:
        (tmp_path / name).mkdir()
    tmp_path.chmod(0o755)
    assert home.protect(tmp_path) == [] and mode(tmp_path) == 0o700


@pytest.mark.parametrize(("bits", "times"), [(0o755, 1), (0o750, 1), (0o777, 3), (0o770, 3)])
def test_a_folder_with_other_things_in_it_is_left_alone_and_named(tmp_path: Path, bits: int, times: int) -> None:
    (tmp_path / "photographs").mkdir()
    tmp_path.chmod(bits)
    warnings = [warning for _ in range(3) for warning in home.protect(tmp_path)]
    assert len(warnings) == times and mode(tmp_path) == bits
    assert all(
        warning.startswith("state-folder-open: ") and warning.endswith(f"chmod 700 {tmp_path}") for warning in warnings
    )


def test_a_mode_that_changes_is_named_again(tmp_path: Path) -> None:
    (tmp_path / "photographs").mkdir()
    for bits in (0o755, 0o750):
        tmp_path.chmod(bits)
        assert len(home.protect(tmp_path)) == 1
        assert home.protect(tmp_path) == []


def test_a_volume_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o755)
    monkeypatch.setattr(home.os.path, "ismount", lambda path: True)
    assert len(home.protect(tmp_path)) == 1 and mode(tmp_path) == 0o755


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.s3fs", "ceph"])
def test_a_file_system_that_hosts_share_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setattr(home, "_file_system", lambda path: kind)
    (warning,) = home.protect(tmp_path)
    assert warning.startswith(f"state-folder-remote: {tmp_path} is on {kind}") and "--snapshot-store" in warning
    assert home.protect(tmp_path) == []


def test_the_file_system_is_that_of_the_innermost_mount(tmp_path: Path) -> None:
    assert home._file_system(Path("/proc/self")) == "proc"
    assert home._file_system(tmp_path) not in ("", "proc")


def test_a_folder_whose_folders_cannot_be_locked_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As over NFS, where flock(2) of a folder is EBADF."""

    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    assert home.unusable(tmp_path) is None
    monkeypatch.setattr(home.fcntl, "flock", flock)
    why = home.unusable(tmp_path)
    assert (
        why is not None
        and why.startswith(f"state-folder-unlockable: folders in {tmp_path} (")
        and "QUICKTHAW_HOME" in why
    )
    assert list((tmp_path / "run").iterdir()) == []


def test_what_a_sandbox_covers_is_hidden(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/shm")
    assert home.hidden(Path("/dev/shm/quickthaw")) == home.hidden(tmp_path / "link" / "x") == "/dev/shm"
    assert home.hidden(Path("/dev/shmem")) is None and home.hidden(tmp_path) is None


def test_a_user_without_home_and_name_has_a_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("QUICKTHAW_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", nobody)
    assert state_folder() == home.state_home() == Path("/.cache/quickthaw")
