"""Dump and restore of a tree that "uses CUDA": the driver's calls have the right order around CRIU's, and its memory needs are
recorded.

The tree and CRIU are real. The driver is the double of cuda_double.py, whose state follows a process through its images as the real
one's does.
"""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest

from checkpoint.criu.binary import Criu
from checkpoint.criu.pagemap import PAGE, process_ids, read_process
from checkpoint.errors import Failed, HostLacks
from checkpoint.inspect import contents
from checkpoint.lazy_pages.client import PageServer, server_config
from checkpoint.lazy_pages.working_set import WorkingSet
from checkpoint.sandbox.process_tree import processes
from checkpoint.sandbox.sandbox import CACHE_DIR, Bind, Sandbox, SandboxConfig
from checkpoint.snapshot import dump, free_space
from checkpoint.snapshot import restore as restore_module
from checkpoint.snapshot.digests import digest_folder
from checkpoint.snapshot.dump import take
from checkpoint.snapshot.library import Library
from checkpoint.snapshot.restore import Cancellation, LazyRestore, restore
from plugin.runtime.config import state_home
from plugin.runtime.steps.engine_output import Output
from tests.kits.checkpoint.cuda_double import GPU0, Double, write
from tests.kits.checkpoint.snapshots import draft
from tests.kits.leftovers import Watch
from tests.t1.checkpoint.test_process_tree import ask, start_tree

pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("criu")]
MEGABYTES = 32
"""More than anything else in the tree's private memory, so that the double takes it for the driver's copy (cuda_double)."""


def inner_pid_of(pid):
    """Return a process's PID in its own PID namespace, or "" if it has ended."""
    status = Path(f"/proc/{pid}/status").read_text() if Path(f"/proc/{pid}").exists() else ""
    return next((line.split()[-1] for line in status.splitlines() if line.startswith("NSpid:")), "")


class Following(Double):
    """The double whose record of a restored process is that of the dump, as the real driver's state is in the process's memory."""

    def __init__(self, folder, inner_pid):
        super().__init__(folder)
        self.inner_pid = inner_pid

    def _record(self, pid):
        file = self.folder / f"{pid}.json"
        if not file.exists() and inner_pid_of(pid) == str(self.inner_pid):
            (self.folder / f"{pid}.host").write_text("contents")
            write(file, json.loads((self.folder / "dumped.json").read_text()))
        return super()._record(pid)

    def checkpoint(self, pid, limit_s=0.0):
        super().checkpoint(pid)
        write(self.folder / "dumped.json", json.loads((self.folder / f"{pid}.json").read_text()))


@pytest.fixture
def rig(tmp_path, monkeypatch):
    watch = Watch(tmp_path)
    for name, value in watch.environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "compile").mkdir()
    gpu = tmp_path / "gpu"
    gpu.mkdir()
    write(gpu / "gpus.json", {GPU0: 1 << 30})
    library, output = Library(tmp_path), Output(None)
    with Sandbox(SandboxConfig(binds=[Bind(tmp_path / "compile", Path(CACHE_DIR), read_only=False)])) as sandbox:
        pid = start_tree(sandbox, output, MEGABYTES)
        # Not the smallest one: PIDs start again after pid_max.
        root = next(p for p in processes(sandbox.init_pid) if inner_pid_of(p) == str(pid))
        write(gpu / f"{root}.json", {"state": "RUNNING", "memory": {GPU0: 1 << 20}})
        (gpu / f"{root}.vram").write_text("contents")
        yield library, sandbox, draft("tree", pid, {"stdout": output.name}), Following(str(gpu), pid), root
    assert watch.gone() == set()


def calls(driver):
    """Return the driver's calls that change something, in order."""
    lines = (driver.folder / "calls").read_text().splitlines()
    return [line.split()[0] for line in lines if line.split()[0] in ("lock", "checkpoint", "restore", "unlock")]


def test_all_processes_leave_the_gpu_for_the_dump_and_resume(rig):
    library, sandbox, wanted, driver, _ = rig
    snapshot = take(
        library, Criu.find(state_home()), sandbox, wanted, library.home / "compile", digest_folder, driver=driver
    )
    assert calls(driver) == ["lock", "checkpoint", "restore", "unlock"]
    assert snapshot.gpu.processes == 1
    assert snapshot.gpu.memory[GPU0] >= 1 << 20
    assert library.load("tree").gpu == snapshot.gpu
    found = contents.inspect(library.path("tree"))
    assert found.total.bytes + found.image_files == snapshot.image_bytes
    assert found.processes[0].kinds["pinned"].bytes == 1 << 16
    assert ask(sandbox, op="count")["count"] == 2
    with restored(library, snapshot, driver) as replica:
        assert replica.pages is None
        assert replica.spans["fill"] > 0
        assert calls(driver) == ["lock", "checkpoint", "restore", "unlock", "restore", "unlock"]
        assert ask(replica.sandbox, op="count")["count"] == 2
        assert ask(replica.sandbox, op="ballast") == {"wrong": 0, "bytes": MEGABYTES << 20}


@contextlib.contextmanager
def restored(library, snapshot, driver, only=(), record=True):
    """Restore as a launch does: every page in place before the tree runs, and the restore cancelled if the page server fails.

    `only`: the pages of these processes, and the others come by their working set.
    """
    output, cancellation = Output(None), Cancellation()

    def on_death(reason):
        cancellation.cancel(Failed("pages-lost", reason))

    known = library.working_set(snapshot.name)
    lazy = LazyRestore(known, record, on_death, pytest.fail, fill=bool(only), fill_only=only)
    try:
        replica = restore(
            library,
            Criu.find(state_home()),
            snapshot,
            [Bind(library.home / "compile", Path(CACHE_DIR), read_only=False)],
            library.home / "compile",
            {"stdout": output.write_fd},
            driver=driver,
            lazy=lazy,
            cancellation=cancellation,
        )
    finally:
        output.close_write_end()
    try:
        yield replica
    finally:
        replica.close()


def test_processes_without_gpu_state_come_back_by_their_working_set(rig):
    library, sandbox, wanted, driver, root = rig
    snapshot = take(
        library, Criu.find(state_home()), sandbox, wanted, library.home / "compile", digest_folder, driver=driver
    )
    only = restore_module.gpu_processes(library, snapshot)
    assert only == (int(inner_pid_of(root)),)
    images = str(library.path("tree") / "images")
    others = {pid: read_process(images, pid).lazy_pages for pid in process_ids(images) if pid not in only}
    known = library.working_set("tree")
    assert others
    for record in (True, False):
        with restored(library, snapshot, driver, only, record) as replica:
            assert replica.pages and not replica.pages.complete.is_set()
            assert calls(driver)[-2:] == ["restore", "unlock"]  # which the double refuses while a page is absent
            assert ask(replica.sandbox, op="count")["count"] == 2
            assert ask(replica.sandbox, op="ballast") == {"wrong": 0, "bytes": MEGABYTES << 20}
            left = replica.pages.stats()["left"]
            assert 0 < left <= sum(others.values()) * PAGE
            replica.pages.first_token()
            replica.pages.requests_done(save=known if record else None)
            assert replica.pages.wait_complete(60)
            assert ask(replica.sandbox, op="count")["count"] == 3
        named = {pid for pid, _, _ in WorkingSet.load(str(known)).ranges}
        assert named and named <= others.keys(), "the others have no faults"


def test_a_page_server_that_dies_after_the_gpu_is_back_is_reported(rig):
    library, sandbox, wanted, driver, _ = rig
    snapshot = take(
        library, Criu.find(state_home()), sandbox, wanted, library.home / "compile", digest_folder, driver=driver
    )
    with restored(library, snapshot, driver, restore_module.gpu_processes(library, snapshot)) as replica:
        os.kill(replica.pages.pid, signal.SIGKILL)
        assert replica.pages.ended.wait(30)
        assert not replica.pages.complete.is_set()


@pytest.fixture
def killed_with_memory(monkeypatch):
    """Return a function that has the page server, or the restored process, killed as soon as the server has its memory."""

    def arrange(victim):
        class Killed(PageServer):
            def _handle(self, event, message, fds):
                super()._handle(event, message, fds)
                if event == "space":
                    found = [pid for pid in descendants() - before if inner_pid_of(pid) == str(message["pid"])]
                    for pid in [self.pid] if victim == "server" else found:
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)

        killed, before = [], descendants()
        monkeypatch.setattr(restore_module, "PageServer", Killed)
        return killed

    return arrange


def descendants():
    """Return the PIDs of all processes below this one."""
    found, waiting = set(), [os.getpid()]
    while waiting:
        for file in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                waiting += map(int, file.read_text().split())
        found.update(waiting)
    return found


@pytest.mark.slow
def test_the_driver_finds_absent_pages_if_the_tree_goes_on_early(rig, monkeypatch):
    """The double refuses what the real driver would: this is what the tests of restores rely on."""
    library, sandbox, wanted, driver, _ = rig
    snapshot = take(
        library, Criu.find(state_home()), sandbox, wanted, library.home / "compile", digest_folder, driver=driver
    )
    servers = []
    monkeypatch.setattr(restore_module, "server_config", lambda *given, fill, **more: server_config(*given, **more))

    def left_out(pages, limit_s, spans):
        servers.append(pages)
        spans["fill"] = 0.0

    monkeypatch.setattr(restore_module, "_fill", left_out)
    with pytest.raises(Failed, match="EFAULT"), restored(library, snapshot, driver):
        pass
    servers[0].close()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["server", "process"])
def test_a_death_while_pages_are_filled_fails_the_restore_by_name(rig, killed_with_memory, victim):
    """The kernel kills a process when memory runs out."""
    library, sandbox, wanted, driver, _ = rig
    snapshot = take(
        library, Criu.find(state_home()), sandbox, wanted, library.home / "compile", digest_folder, driver=driver
    )
    before = calls(driver)
    killed = killed_with_memory(victim)
    with pytest.raises(Failed, match="pages-lost|criu-restore-failed"), restored(library, snapshot, driver):
        pass
    assert killed and calls(driver) == before
    assert not list((library.home / "run").glob("restore-*"))


@pytest.mark.slow
@pytest.mark.parametrize("part", [0.0, 0.5])
def test_an_image_cut_short_fails_the_restore_by_name(rig, part):
    """Also if nobody has checked its digest."""
    library, sandbox, wanted, driver, _ = rig
    snapshot = take(
        library, Criu.find(state_home()), sandbox, wanted, library.home / "compile", digest_folder, driver=driver
    )
    before = calls(driver)
    for file in (library.path("tree") / "images").glob("pages-*.img"):
        os.truncate(file, int(file.stat().st_size * part) // 4096 * 4096)
    with pytest.raises(Failed, match="pages-lost|criu-restore-failed"), restored(library, snapshot, driver):
        pass
    assert calls(driver) == before
    assert not list((library.home / "run").glob("restore-*"))


def test_a_failed_dump_resumes_the_gpu(rig):
    library, sandbox, wanted, driver, root = rig
    broken = library.home / "criu"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(Failed, match="criu-dump-failed"):
        take(library, Criu(broken), sandbox, wanted, library.home / "compile", digest_folder, driver=driver)
    assert json.loads((driver.folder / f"{root}.json").read_text())["state"] == "RUNNING"
    assert library.names() == []
    assert ask(sandbox, op="count")["count"] == 2


@pytest.mark.slow
def test_a_snapshot_with_gpu_state_is_refused_by_name_without_a_gpu(rig):
    library, sandbox, wanted, driver, _ = rig
    snapshot = take(
        library, Criu.find(state_home()), sandbox, wanted, library.home / "compile", digest_folder, driver=driver
    )
    read, write_end = os.pipe()
    try:
        with pytest.raises(HostLacks, match="gpu-missing"):
            restore(library, Criu.find(state_home()), snapshot, [], library.home / "compile", {"stdout": write_end})
    finally:
        os.close(read)
        os.close(write_end)


@pytest.mark.slow
def test_a_snapshots_clock_is_the_frozen_trees(rig):
    """The driver's time before the dump has passed for the tree, too: a restore must not turn its monotonic clock back."""
    library, sandbox, wanted, driver, root = rig
    write(driver.folder / "faults.json", [{"op": "checkpoint", "hang": 1.5}])
    before = time.monotonic_ns()
    snapshot = take(
        library, Criu.find(state_home()), sandbox, wanted, library.home / "compile", digest_folder, driver=driver
    )
    assert before + 1_500_000_000 <= snapshot.monotonic_ns <= time.monotonic_ns()


def test_gpu_memory_counts_in_a_dumps_disk_space(rig):
    library, sandbox, wanted, driver, root = rig
    record = json.loads((driver.folder / f"{root}.json").read_text())
    write(driver.folder / f"{root}.json", {**record, "memory": {GPU0: 1 << 50}})
    with pytest.raises(Failed, match="host-memory-short"):
        take(library, Criu.find(state_home()), sandbox, wanted, library.home / "compile", digest_folder, driver=driver)
    assert calls(driver) == []


def test_gpu_memory_counts_in_a_dumps_time_limit(rig, monkeypatch):
    library, sandbox, wanted, driver, _ = rig
    sizes = iter([1 << 20, 10 << 30, 10 << 30])
    monkeypatch.setattr(dump, "private_bytes", lambda pids: next(sizes))
    monkeypatch.setattr(free_space, "check_disk", lambda folder, wanted: seen.append(wanted))
    seen = []

    class Watched(Criu):
        def dump(self, *arguments, **more):
            seen.append(arguments[-1])
            raise Failed("criu-dump-failed", "enough")

    criu = Watched(Criu.find(state_home()).program)
    with pytest.raises(Failed, match="enough"):
        take(library, criu, sandbox, wanted, library.home / "compile", digest_folder, driver=driver)
    assert 10 << 30 <= seen[1] < 11 << 30  # and the files in /dev/shm and TMPDIR
    assert seen[2] > (10 << 30) / restore_module.DUMP_SLOWEST


def test_a_dump_that_loses_the_gpu_keeps_no_snapshot(rig):
    library, sandbox, wanted, driver, root = rig
    write(driver.folder / "faults.json", [{"op": "restore", "result": "CUDA_ERROR_OUT_OF_MEMORY", "state": "FAILED"}])
    with pytest.raises(Failed) as caught:
        take(library, Criu.find(state_home()), sandbox, wanted, library.home / "compile", digest_folder, driver=driver)
    assert caught.value.code == "cuda-stuck"
    assert library.names() == []
