"""A speculative restore: no process of it runs before validation, and a rejected one leaves nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint.criu.binary import Criu
from checkpoint.errors import Busy, HostLacks
from checkpoint.sandbox.process_tree import processes
from checkpoint.sandbox.sandbox import TMP_DIR, Bind, Sandbox
from checkpoint.snapshot import restore as restore_module
from checkpoint.snapshot import speculative
from checkpoint.snapshot.digests import digest_folder
from checkpoint.snapshot.dump import take
from checkpoint.snapshot.library import Library
from checkpoint.snapshot.manifest import Snapshot
from checkpoint.snapshot.restore import LazyRestore, Restored, restore
from plugin.runtime.config import state_home
from plugin.runtime.steps.engine_output import Output
from tests.kits.checkpoint.snapshots import draft, sandbox_tmpdir, wait_for

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.xdist_group("criu")]
PROGRAM = Path(__file__).parents[2] / "programs" / "counter.py"
WORDS = ["restore", "counter"]


class Command:
    """The steps of one command: begin_saved, restore, save_plan."""

    def __init__(self, home: Path, snapshot: Snapshot, criu: Criu) -> None:
        self.library, self.snapshot, self.criu = Library(home), snapshot, criu
        self.home = home
        self.warnings: list[str] = []

    def begin_saved(self) -> speculative.BegunRestore | None:
        speculative.begin_saved(self.home, WORDS)
        return speculative._begun

    @contextlib.contextmanager
    def restored(self, *binds: Bind) -> Iterator[tuple[Restored, Output]]:
        output = Output(None, pipe=speculative.take_pipe("stdout"))
        how = LazyRestore(None, False, self.warnings.append, self.warnings.append)
        try:
            replica = restore(
                self.library,
                self.criu,
                self.snapshot,
                binds,
                self.home / "compile",
                {"stdout": output.write_fd},
                lazy=how,
            )
        finally:
            output.close_write_end()
        try:
            yield replica, output
        finally:
            replica.close()

    def work_folders(self) -> list[Path]:
        return list((self.home / "run").glob("restore-*"))


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory) -> tuple[Path, Snapshot, Criu]:
    home = tmp_path_factory.mktemp("home")
    try:
        criu = Criu.find(state_home())
        assert criu.version
    except HostLacks as error:
        pytest.skip(str(error))
    (home / "compile").mkdir()
    output = Output(None)
    with Sandbox() as sandbox:
        python = os.path.realpath(sys.executable)
        pid = sandbox.start([python, "-I", "-S", str(PROGRAM), TMP_DIR], {}, "/", output.write_fd, output.write_fd)
        wait_for(sandbox_tmpdir(sandbox) / "count")
        manifest = draft("counter", pid, {"stdout": output.name})
        found = take(Library(home), criu, sandbox, manifest, home / "compile", digest_folder)
    output.close_write_end()
    return home, found, criu


@pytest.fixture
def command(snapshot) -> Iterator[Command]:
    """Start a command line a second time, whose first start saved its plan."""
    command = Command(*(snapshot[0], snapshot[1], snapshot[2]))
    assert command.begin_saved() is None
    with command.restored() as (replica, _):
        assert replica.plan is not None
        speculative.save_plan(replica.plan)
    yield command
    speculative.discard()
    assert speculative._plan_file is not None
    speculative._plan_file.unlink(missing_ok=True)
    assert command.work_folders() == []


def tree_of(begun: speculative.BegunRestore) -> list[int]:
    assert begun.init is not None
    return processes(begun.init[0].pid)


def wait_stopped(begun: speculative.BegunRestore) -> int:
    """Wait until CRIU has left the program stopped; return its PID on the host."""
    limit = time.monotonic() + 20
    while time.monotonic() < limit:
        for pid in tree_of(begun):
            with contextlib.suppress(OSError):
                # Not by its command line, which is in memory that the page server copies.
                name, _, fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
                if "(python" in name and fields.split()[0] == "T":
                    return pid
        time.sleep(0.01)
    raise AssertionError("no process of the tree was left stopped")


def count(pid: int) -> int:
    return int(Path(f"/proc/{pid}/root{TMP_DIR}/count").read_text())


def gone(pid: int, limit_s: float = 10.0) -> bool:
    limit = time.monotonic() + limit_s
    while Path(f"/proc/{pid}").exists() and time.monotonic() < limit:
        time.sleep(0.005)
    return not Path(f"/proc/{pid}").exists()


def counts_on(pid: int, limit_s: float = 10.0) -> bool:
    before, limit = count(pid), time.monotonic() + limit_s
    while time.monotonic() < limit:
        if count(pid) > before:
            return True
        time.sleep(0.01)
    return False


def test_a_speculative_restore_stays_stopped_until_claimed(command: Command) -> None:
    begun = command.begin_saved()
    assert begun is not None
    pid = wait_stopped(begun)
    assert not counts_on(pid, 0.3)
    with command.restored() as (replica, output):
        assert replica.work == begun.work
        assert counts_on(pid)
        (sandbox_tmpdir(replica.sandbox) / "say").touch()
        limit = time.monotonic() + 10
        while output.last() != "heard" and time.monotonic() < limit:
            time.sleep(0.02)
        assert output.last() == "heard"
        assert replica.pages is not None
        replica.pages.first_token()
        replica.pages.requests_done()
        assert replica.pages.wait_complete(30)
    assert not command.warnings
    assert not Path(f"/proc/{pid}").exists()


def test_another_plan_ends_a_speculative_restore(command: Command, tmp_path: Path) -> None:
    begun = command.begin_saved()
    assert begun is not None
    pid = wait_stopped(begun)
    with command.restored(Bind(tmp_path, Path("/run/quickthaw/more"))) as (replica, _):
        assert replica.work != begun.work
        assert not begun.work.exists()
        assert not Path(f"/proc/{pid}").exists()
        assert replica.sandbox.alive
    assert not command.warnings


def test_unpacked_compiled_code_ends_a_speculative_restore(command: Command, monkeypatch) -> None:
    begun = command.begin_saved()
    assert begun is not None
    monkeypatch.setattr(restore_module, "unpack_cache", lambda *_: True)
    with command.restored() as (replica, _):
        assert replica.work != begun.work


def test_a_failed_speculative_restore_is_repeated(command: Command) -> None:
    begun = command.begin_saved()
    assert begun is not None
    pid = wait_stopped(begun)
    assert begun.init is not None
    os.kill(begun.init[0].pid, signal.SIGKILL)
    assert gone(pid)  # the kernel has killed init with its parent, and the tree with init
    with command.restored() as (replica, _):
        assert replica.work != begun.work
        assert [text for text in command.warnings if "once more from the start" in text]
        (pid,) = processes(replica.sandbox.init_pid)
        assert counts_on(pid)


def test_a_removed_snapshot_is_not_begun(command: Command) -> None:
    folder = command.library.path("counter")
    folder.rename(folder.with_name("moved"))
    try:
        assert command.begin_saved() is None
    finally:
        folder.with_name("moved").rename(folder)


def test_a_speculative_restore_ends_with_its_owner(command: Command) -> None:
    begun = command.begin_saved()
    assert begun is not None
    pid = wait_stopped(begun)
    # As the kernel does when the command is killed.
    assert begun.init is not None and begun.pages is not None
    for _, control in (begun.init, begun.pages):
        control.close()
    assert gone(pid)
    speculative.discard()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"version": 0}', b'{"version": 1, "boot": "", "plan": {}}'])
def test_an_invalid_plan_begins_nothing(command: Command, damage: bytes) -> None:
    assert speculative._plan_file is not None
    speculative._plan_file.write_bytes(damage)
    assert command.begin_saved() is None


def test_a_plan_of_an_earlier_boot_begins_nothing(command: Command, monkeypatch) -> None:
    monkeypatch.setattr(speculative, "boot_id", lambda: "another")
    assert command.begin_saved() is None


def test_a_plan_belongs_to_words_folder_and_settings(command: Command, monkeypatch, tmp_path) -> None:
    speculative.begin_saved(command.home, [*WORDS, "--port", "1"])
    assert speculative._begun is None
    with monkeypatch.context() as patched:
        patched.setenv("QUICKTHAW_VERIFY", "always")
        assert command.begin_saved() is None
    with monkeypatch.context() as patched:
        patched.chdir(tmp_path)
        assert command.begin_saved() is None
    assert command.begin_saved() is not None


def test_a_removed_working_folder_is_tolerated(command: Command, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    with monkeypatch.context() as patched:
        patched.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        assert command.begin_saved() is None


def test_old_plans_are_removed(tmp_path: Path, command: Command) -> None:
    plan = {"run": str(tmp_path)}
    for number in range(speculative._MAX_PLANS + 3):
        speculative.begin_saved(tmp_path, ["restore", str(number)])
        (tmp_path / "run").mkdir(exist_ok=True)
        speculative.save_plan(plan)
    notes = list((tmp_path / "run").glob("next-*.json"))
    assert len(notes) == speculative._MAX_PLANS
    assert {path.stat().st_mode & 0o777 for path in notes} == {0o600}
    shutil.rmtree(tmp_path / "run")
    speculative.save_plan(plan)  # not writable: only costs time
    command.begin_saved()


def test_a_snapshot_is_not_removed_during_a_speculative_restore(command: Command) -> None:
    assert command.begin_saved() is not None
    with pytest.raises(Busy):
        command.library.remove("counter")
    speculative.discard()
    assert command.library.has("counter")


def test_plans_of_a_removed_snapshot_are_removed(command: Command) -> None:
    with command.restored() as (replica, _):
        speculative.save_plan(replica.plan)
    notes = command.home / "run"
    (notes / "next-other.json").write_text('{"plan": {"snapshot": "/another"}}')
    (notes / "next-broken.json").write_text("{")
    assert len(list(notes.glob("next-*.json"))) == 3  # with its own
    speculative.remove_plans(notes, command.library.path(command.snapshot.name))
    assert {path.name for path in notes.glob("next-*.json")} == {"next-other.json", "next-broken.json"}
