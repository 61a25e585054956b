"""Helpers forked before the command is known: they keep nothing of their owner open, and end with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoint.sandbox import prestart

ROOT = Path(__file__).resolve().parents[3]

# A command with an inherited descriptor, as a supervisor passes it; it prints its helpers' PIDs and waits.
OWNER = """
import os, sys
sys.path.insert(0, sys.argv[1])
from checkpoint.sandbox import prestart
prestart.start()
(init, _), (pages, _) = prestart._init[0], prestart._page_server[0]
print(init.pid, pages.pid, flush=True)
sys.stdin.readline()
"""


def ended(pid: int, limit_s: float = 5.0) -> bool:
    """Return whether a process has ended (an unreaped zombie counts as ended)."""
    limit = time.monotonic() + limit_s
    while time.monotonic() < limit:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def _opened(pid: int) -> list[str]:
    """Return the open files of a process, each kind once, and every socket."""
    links = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(fd).partition(":")[0])
    files = sorted({link for link in links if link != "socket"})
    return [*files, *(link for link in links if link == "socket")]


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


def test_helpers_keep_nothing_of_their_owner_open_and_end_with_it(owner: subprocess.Popen[str], tmp_path: Path) -> None:
    helpers = [int(pid) for pid in owner.stdout.readline().split()]
    for pid, name in zip(helpers, ["quickthaw-outer", "quickthaw-pages"], strict=True):
        # It may still import modules, with a file of code open.
        limit = time.monotonic() + 5
        while (
            not (settled := (_name(pid), *_opened(pid)) == (name, "/dev/null", "socket")) and time.monotonic() < limit
        ):
            time.sleep(0.01)
        assert settled, (_name(pid), _opened(pid))
        assert os.getsid(pid) == pid  # an interrupt at the owner's terminal does not reach it
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # as a service manager sends it to all processes
            os.kill(pid, number)
    time.sleep(0.1)
    assert not any(ended(pid, 0.01) for pid in helpers)
    owner.kill()
    assert all(ended(pid) for pid in helpers)


# An owner on a host with a GPU, whose driver takes a while to initialise.
GPU_OWNER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from checkpoint.cuda import helper
from checkpoint.sandbox import prestart

class Driver:
    def __init__(self):
        time.sleep(0.5)
    def version(self):
        return f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}"

helper.REAL, prestart.NVIDIA = "__main__:Driver", Path("/dev/null" if sys.argv[2] == "gpu" else "/dev/none")
prestart.start()
print(*(process.pid for process, _ in prestart._cuda), flush=True)
if sys.argv[3] == "used":
    time.sleep(0.6)  # the command's imports
    with helper.Helper(helper.REAL) as first:
        ready = time.monotonic()
        print(first.version(), flush=True)
        assert time.monotonic() - ready < 0.4, "initialised meanwhile"
        print(prestart.take_cuda_helper())
else:
    prestart.end_unused()
"""


@pytest.mark.parametrize("use", ["used", "unused"])
def test_the_cuda_drivers_helper_initialises_from_the_first_moment_on(use: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GPU_OWNER, str(ROOT), "gpu", use],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "1"},
        check=False,
    )
    pid, *answers = done.stdout.splitlines()
    assert answers == ([f"{pid} None", "None"] if use == "used" else []), done.stderr
    assert ended(int(pid))


def test_without_a_gpu_no_helper_of_its_driver_starts() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GPU_OWNER, str(ROOT), "none", "unused"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_a_forked_child_has_the_interface_of_popen() -> None:
    pid = os.fork()
    if not pid:
        time.sleep(60)
        os._exit(0)
    child = prestart.Forked(pid)
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.01)
    child.kill()
    assert child.wait(5.0) == -9
    assert child.poll() == child.wait() == -9
    child.send_signal(15)  # to nobody


@pytest.mark.parametrize("number", [prestart._SYS_CLOSE_RANGE, 100_000], ids=["close_range", "an older kernel"])
def test_closing_takes_no_longer_where_the_limit_is_high(number):
    """In a container the limit may be 2^30: closing one by one takes minutes. Here in a child, since all it has open is closed."""
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from checkpoint.sandbox import prestart\n"
        "prestart._SYS_CLOSE_RANGE = int(sys.argv[2])\n"
        "low, kept, high = os.open('/dev/null', 0), os.dup2(1, 50), os.dup2(1, 900)\n"
        "prestart._close(3, kept - 1); prestart._close(kept + 1, prestart._MOST_FDS)\n"
        "os.write(1, str(sorted(int(n) for n in os.listdir('/proc/self/fd'))[:4]).encode())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), str(number)], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.stdout == "[0, 1, 2, 3]", done.stderr  # 3: the descriptor of the listing
