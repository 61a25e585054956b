"""Taking and restoring a tree that "uses CUDA": the driver's calls stand in the right order around CRIU's, and what they need is recorded.

The tree and CRIU are real; the driver is the double of cuda_double.py, whose state follows a process through its images as the real one's does.
"""

import json
import os
from pathlib import Path

import pytest
from cuda_double import GPU0, Double, write

from checkpoint.criu import Criu
from checkpoint.errors import Failed, HostLacks
from checkpoint.library import Library
from checkpoint.sandbox import CACHE_DIR, Bind, Sandbox, SandboxConfig
from checkpoint.sealing import seal
from checkpoint.snapshot import processes, restore, take
from plugin.output import Output
from plugin.settings import state_home
from tests.leftovers import Watch
from tests.t1.checkpoint_kit import draft
from tests.t1.test_checkpoint_tree import ask, start_tree

pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("criu")]


def inner_pid_of(pid):
    """What a process is called in its own pid namespace; empty where it is gone."""
    status = Path(f"/proc/{pid}/status").read_text() if Path(f"/proc/{pid}").exists() else ""
    return next((line.split()[-1] for line in status.splitlines() if line.startswith("NSpid:")), "")


class Following(Double):
    """The double, whose record of a restored process is the one it had at the dump: the real driver's lies in the process's memory."""

    def __init__(self, folder, inner_pid):
        super().__init__(folder)
        self.inner_pid = inner_pid

    def _record(self, pid):
        file = self.folder / f"{pid}.json"
        if not file.exists() and inner_pid_of(pid) == str(self.inner_pid):
            (self.folder / f"{pid}.host").write_text("contents")
            write(file, json.loads((self.folder / "dumped.json").read_text()))
        return super()._record(pid)

    def checkpoint(self, pid):
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
        pid = start_tree(sandbox, output, 1)
        # Not the least of them: pids begin anew at pid_max.
        root = next(p for p in processes(sandbox.init_pid) if inner_pid_of(p) == str(pid))
        write(gpu / f"{root}.json", {"state": "RUNNING", "memory": {GPU0: 1 << 20}})
        (gpu / f"{root}.vram").write_text("contents")
        yield library, sandbox, draft("tree", pid, {"stdout": output.name}), Following(str(gpu), pid), root
    assert watch.gone() == set()


def calls(driver):
    """The driver's calls that change something, in order."""
    lines = (driver.folder / "calls").read_text().splitlines()
    return [line.split()[0] for line in lines if line.split()[0] in ("lock", "checkpoint", "restore", "unlock")]


def test_the_gpu_is_left_for_the_dump_and_taken_again_by_everybody(rig):
    library, sandbox, wanted, driver, _ = rig
    snapshot = take(library, Criu.find(state_home()), sandbox, wanted, library.home / "compile", seal, driver=driver)
    assert calls(driver) == ["lock", "checkpoint", "restore", "unlock"]
    assert snapshot.gpu.processes == 1
    assert snapshot.gpu.memory[GPU0] >= 1 << 20
    assert library.load("tree").gpu == snapshot.gpu
    assert ask(sandbox, op="count")["count"] == 2
    output = Output(None)
    replica = restore(
        library,
        Criu.find(state_home()),
        snapshot,
        [Bind(library.home / "compile", Path(CACHE_DIR), read_only=False)],
        library.home / "compile",
        {"stdout": output.write_fd},
        driver=driver,
    )
    output.handed_over()
    try:
        assert calls(driver) == ["lock", "checkpoint", "restore", "unlock", "restore", "unlock"]
        assert ask(replica.sandbox, op="count")["count"] == 2
    finally:
        replica.close()


def test_a_dump_that_fails_gives_the_gpu_back(rig):
    library, sandbox, wanted, driver, root = rig
    broken = library.home / "criu"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(Failed, match="criu-dump-failed"):
        take(library, Criu(broken), sandbox, wanted, library.home / "compile", seal, driver=driver)
    assert json.loads((driver.folder / f"{root}.json").read_text())["state"] == "RUNNING"
    assert library.names() == []
    assert ask(sandbox, op="count")["count"] == 2


def test_a_snapshot_with_gpu_state_is_refused_by_name_without_a_gpu(rig):
    library, sandbox, wanted, driver, _ = rig
    snapshot = take(library, Criu.find(state_home()), sandbox, wanted, library.home / "compile", seal, driver=driver)
    read, write_end = os.pipe()
    try:
        with pytest.raises(HostLacks, match="gpu-missing"):
            restore(library, Criu.find(state_home()), snapshot, [], library.home / "compile", {"stdout": write_end})
    finally:
        os.close(read)
        os.close(write_end)
