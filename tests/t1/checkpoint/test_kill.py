"""kill -9 at each phase of a take and of a restore: nothing is left behind, the library is intact, and the next run works."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoint.snapshot.digests import verify
from checkpoint.snapshot.library import Library
from tests.kits.leftovers import Watch, processes

pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("criu"), pytest.mark.slow, pytest.mark.timeout(400)]
OWNER = Path(__file__).parents[2] / "programs" / "owner.py"


@pytest.fixture
def rig(tmp_path):
    (tmp_path / "compile").mkdir()
    watch = Watch(tmp_path)

    def start(rounds):
        env = {**os.environ, **watch.environment}
        argv = [sys.executable, str(OWNER), str(tmp_path), str(rounds)]
        return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(rounds):
        """Run to the end and assert success."""
        with start(rounds) as process:
            out, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and out.splitlines()[-1] == "done", errors[-2000:]

    yield tmp_path, watch, start, finish


def intact(home):
    """Assert that every named snapshot is complete."""
    library = Library(home)
    for name in library.names():
        verify(library.path(name), library.load(name).files, always=True)
    return library


@pytest.mark.parametrize("victim", ["owner", "criu", "init", "tree"])
@pytest.mark.parametrize("moment", ["sandbox", "take", "restore"])
def test_kill_at_a_phase(rig, moment, victim):
    home, watch, start, finish = rig
    draw = random.Random(f"{moment} {victim}")
    # A restore finds what it needs at every moment.
    finish(1)
    process = start(3)
    with process:
        for line in process.stdout:
            if line.strip() == moment:
                break
        time.sleep(draw.uniform(0.0, 0.3))
        if victim == "owner":
            process.kill()
        else:
            name = {"criu": b"criu.bin", "init": b"sandbox.init", "tree": b"tree.py"}[victim]
            for pid in processes(watch._marker):
                try:
                    if name in Path(f"/proc/{pid}/cmdline").read_bytes():
                        os.kill(pid, signal.SIGKILL)
                except (OSError, ProcessLookupError):
                    continue
        # It must end: with an error, or successfully if there was nothing to kill.
        _, errors = process.communicate(timeout=120)
        assert "Traceback" not in errors or "checkpoint.errors" in errors or "AssertionError" in errors, errors[-2000:]
    assert {left for left in watch.gone() if not left.startswith(str(home))} == set()
    intact(home)
    finish(1)
    Library(home).sweep()
    assert watch.gone() == set()


def running(watch, name, limit_s=20.0):
    """Wait for a process of the owner with `name` in its command line, which is not the owner's."""
    limit = time.monotonic() + limit_s
    while time.monotonic() < limit:
        for pid in processes(watch._marker):
            with contextlib.suppress(OSError):
                if name in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
    raise AssertionError(f"no process {name} within {limit_s:.0f} s")


def test_a_page_server_killed_while_it_fills_fails_the_restore_by_name(rig):
    """In the second restore, the one with every page in place first: an error by name, or it was over."""
    home, watch, start, finish = rig
    finish(1)
    failures = []
    for after in (0.0, 0.0, 0.02, 0.05):
        with start(1) as process:
            for line in process.stdout:
                if line.strip() == "restored":  # the first
                    break
            for line in process.stdout:
                if line.strip() == "restore":
                    break
            pid = running(watch, b"lazy_pages.main")
            time.sleep(after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _, errors = process.communicate(timeout=120)
        if process.returncode:
            assert re.search(r"pages-lost|restore-failed", errors), errors[-2000:]
            failures.append(errors)
    assert failures
    assert {left for left in watch.gone() if not left.startswith(str(home))} == set()
    intact(home)
    finish(1)


def test_killed_at_any_moment(rig):
    home, watch, start, finish = rig
    draw = random.Random(7)
    for _ in range(12):
        with start(2) as process:
            time.sleep(draw.uniform(0.2, 3.0))
            process.kill()
            process.communicate(timeout=60)
    assert {left for left in watch.gone() if not left.startswith(str(home))} == set()
    library = intact(home)
    library.sweep()
    assert watch.gone() == set()
    assert [p.name for p in library.folder.glob(".partial-*")] == []
    finish(1)
