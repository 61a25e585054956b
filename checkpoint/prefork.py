"""Process 1 of the first sandbox, started before it is known what the sandbox will be: it boots while its owner still imports.

`start` is called as the very first thing of a command that will want a sandbox; `take` hands what it started to the first `Sandbox`. Where
none is made, the process sees its control socket close at the owner's end and exits.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

_waiting: list[tuple[subprocess.Popen[bytes], socket.socket]] = []


def spawn() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start process 1's program; it waits for its configuration on the socket. Returns the process and our end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("init.py")), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
    return process, ours


def start() -> None:
    """Start one beforehand."""
    _waiting.append(spawn())


def take() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The one that was started beforehand, or a new one."""
    while _waiting:
        process, ours = _waiting.pop()
        if process.poll() is None:
            return process, ours
        ours.close()
    return spawn()
