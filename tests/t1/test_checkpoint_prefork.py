"""Helpers forked before anything is known: nothing of their owner's is left open in them, and they end with it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoint import prefork

ROOT = Path(__file__).resolve().parents[2]

# A command with a descriptor that it inherited, as one started by a supervisor has; it says what its helpers are and waits.
OWNER = """
import os, sys
sys.path.insert(0, sys.argv[1])
from checkpoint import prefork
prefork.start()
(init, _), (pages, _) = prefork._init[0], prefork._page_server[0]
print(init.pid, pages.pid, flush=True)
sys.stdin.readline()
"""


def gone(pid: int, limit_s: float = 5.0) -> bool:
    """Whether a process has ended (a zombie that nobody reaps counts)."""
    limit = time.monotonic() + limit_s
    while time.monotonic() < limit:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def owner(tmp_path: Path):
    inherited = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(ROOT)],
        pass_fds=[inherited],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    os.close(inherited)
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_helpers_keep_nothing_of_their_owner_and_end_with_it(owner: subprocess.Popen[str], tmp_path: Path) -> None:
    helpers = [int(pid) for pid in owner.stdout.readline().split()]
    names = []
    for pid in helpers:
        limit = time.monotonic() + 5
        while (name := Path(f"/proc/{pid}/comm").read_text().strip()).startswith("python") and time.monotonic() < limit:
            time.sleep(0.005)
        names.append(name)
        opened = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
        assert {link for link in opened if not link.startswith("socket:")} == {"/dev/null"}
        assert len([link for link in opened if link.startswith("socket:")]) == 1
        assert os.getsid(pid) == pid  # an interrupt typed at the owner's terminal does not reach it
    assert names == ["quickthaw-outer", "quickthaw-pages"]
    owner.kill()
    assert all(gone(pid) for pid in helpers)


def test_a_forked_child_answers_as_a_popen_does() -> None:
    pid = os.fork()
    if not pid:
        time.sleep(60)
        os._exit(0)
    child = prefork.Forked(pid)
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.01)
    child.kill()
    assert child.wait(5.0) == -9
    assert child.poll() == child.wait() == -9
    child.send_signal(15)  # to nobody
