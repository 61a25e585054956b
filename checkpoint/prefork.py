"""Helper processes started before it is known what they will be for: they boot while their owner still imports.

Process 1 of the first sandbox, and the page server of the first restore. `start` is called as the very first thing of a command that will
want them; `take_init` and `take_page_server` hand over what was started, or start one. What nobody takes sees its control socket close,
at `settled` or at the owner's end, and exits.
"""

from __future__ import annotations

import gc
import socket
import subprocess
import sys
from pathlib import Path

Started = tuple["subprocess.Popen[bytes]", socket.socket]

_PAGE_SERVER = "import sys; sys.path.insert(0, sys.argv[1]); from checkpoint.pages.daemon import main; sys.exit(main(int(sys.argv[2])))"
_END_LIMIT_S = 5.0
_init: list[Started] = []
_page_server: list[Started] = []


def _spawn(*program: str) -> Started:
    """Start a helper; it waits for its configuration on a socket. Returns the process and our end of it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", *program, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # An interrupt at a terminal goes to the whole foreground group, and would end the sandbox before its owner can stop the engine.
            start_new_session=True,
        )
    return process, ours


def _spawn_init() -> Started:
    return _spawn(str(Path(__file__).with_name("init.py")))


def _spawn_page_server() -> Started:
    return _spawn("-c", _PAGE_SERVER, str(Path(__file__).resolve().parents[1]))


def start() -> None:
    """Start one of each beforehand, and let this interpreter do as little as it can beside importing.

    Its threads take turns every half millisecond instead of every five: the one that restores waits for the interpreter whenever it has
    waited for something else. Collecting garbage starts with `settled`.
    """
    gc.disable()
    sys.setswitchinterval(0.0005)
    _init.append(_spawn_init())
    _page_server.append(_spawn_page_server())


def settled() -> None:
    """The start is over, or no longer this process's to hurry: back to an interpreter's usual ways, without a page server that nobody took.

    What has been imported stays out of every later collection.
    """
    if not gc.isenabled():
        sys.setswitchinterval(0.005)
        gc.freeze()
        gc.enable()
    while _page_server:
        process, ours = _page_server.pop()
        ours.close()
        try:
            process.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _take(waiting: list[Started]) -> Started | None:
    while waiting:
        process, ours = waiting.pop()
        if process.poll() is None:
            return process, ours
        ours.close()
    return None


def take_init() -> Started:
    """Process 1 of a sandbox: the one that was started beforehand, or a new one."""
    return _take(_init) or _spawn_init()


def take_page_server() -> Started:
    """A page server: the one that was started beforehand, or a new one."""
    return _take(_page_server) or _spawn_page_server()
