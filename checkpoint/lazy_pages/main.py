"""The page server's process: one for a host (a user's state folder), which serves every tree that is being restored.

Run as `python -I -S -c '…main(control)'`, or forked, by checkpoint.sandbox.prestart. Standard library only: it starts in 25 ms, beside
CRIU.

A process starts before it is known what it will serve. Told that, it tries to become the host's server: it takes a lock in the folder where
they meet and listens beside it. Where another one has the lock, it hands the tree over to that one (the control socket, the listener that
CRIU connects to, what the owner said) and exits. Where handing over fails in any way, it serves the tree itself, alone. So what a
single restore pays is a lock that nobody else wants.

What is promised:
- A tree is served by one process: the other one begins after the word that ends the handing over, and that word cannot be said once the
  other has given up waiting for it.
- Each tree has its own Daemon and its own loop thread, and shares no table with another (see daemon for why that cannot corrupt). What
  fails in one is told to its owner and closes its descriptors; the others go on.
- Whoever serves ends by closing the control socket, and says before whether it failed; a process that is killed closes all of them.
- The process goes away when no tree is left. It stops listening and releases the lock first; who comes too late takes the lock itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from checkpoint.lazy_pages.read_order import Reading

if TYPE_CHECKING:
    from checkpoint.lazy_pages.fault_handler import Daemon

LOCK_NAME = "page-server.lock"
SOCKET_NAME = "page-server.socket"
_ANSWER_S = 0.1
"""How long who hands over waits in all: it has a restore to serve."""
_OFFER_S = 0.05
"""How long the host's server waits for each word of who hands over: others may be waiting behind it."""
_AGAIN_S = 0.001
_MESSAGE_BYTES = 1 << 16
_WAITING = 64
# Threads of this process take turns as often as this; else a fault waits for 5 ms of another tree's planning, and the disk for our imports.
_TURN_S = 0.0005
_TAKEN, _YOURS = b"taken", b"yours"


class Tree:
    """What an owner said: serve this. `said` is the configuration (JSON, see Daemon)."""

    def __init__(self, control: socket.socket, listener: socket.socket, said: bytes) -> None:
        self.control = control
        self.listener = listener
        self.said = said
        self.reading: Reading | None = None
        """Where a disk was asked already."""

    @property
    def config(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.said)
        return found

    def close(self) -> None:
        """Only our copies: whoever took the tree over has its own."""
        self.control.close()
        self.listener.close()


def code_key() -> bytes:
    """What must be the same in both for one to serve the other's trees: the code, the interpreter, and the names of files and processes."""
    facts: list[object] = [sys.version]
    for name in sorted(sys.modules):
        if name.startswith("checkpoint."):
            path = sys.modules[name].__file__ or ""
            info = os.stat(path)
            facts.append((path, info.st_size, info.st_mtime_ns))
    facts += [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("mnt", "pid", "user")]
    return repr(facts).encode()


class Meeting:
    """The lock and the socket of the host's server."""

    def __init__(self, folder_fd: int, lock_fd: int, listener: socket.socket, key: bytes) -> None:
        self._folder_fd = folder_fd
        self._lock_fd = lock_fd
        self.listener = listener
        self.key = key
        """See code_key."""

    @classmethod
    def open(cls, folder_fd: int, key: bytes) -> Meeting | None:
        """Become the host's server; None where another one is. Raises OSError."""
        lock_fd = os.open(LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder_fd)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(SOCKET_NAME, dir_fd=folder_fd)  # a killed one's
            listener.bind(_address(folder_fd))
            listener.listen(_WAITING)
        except OSError as error:
            listener.close()
            os.close(lock_fd)
            if isinstance(error, BlockingIOError):
                return None
            raise
        return cls(folder_fd, lock_fd, listener, key)

    def close(self) -> None:
        """Let the next one be the host's server. Who waits to be heard sees the end of its connection."""
        with contextlib.suppress(OSError):  # the folder was removed
            os.unlink(SOCKET_NAME, dir_fd=self._folder_fd)
        self.listener.close()
        os.close(self._lock_fd)


def _address(folder_fd: int) -> str:
    """A socket's name has 108 bytes: name the folder by its descriptor."""
    return f"/proc/self/fd/{folder_fd}/{SOCKET_NAME}"


def _is_ours(other: socket.socket) -> bool:
    """Whether the other side's process is of the same user."""
    _, user, _ = struct.unpack("3i", other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return bool(user == os.getuid())


# Who hands over


def meet(folder: str, tree: Tree) -> Meeting | bool:
    """The meeting where this process is the host's server now; True where the tree was handed over; False: serve it alone."""
    limit = time.monotonic() + _ANSWER_S
    try:
        folder_fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    meeting: Meeting | None = None
    try:
        key = code_key()
        while (left := limit - time.monotonic()) > 0:
            meeting = Meeting.open(folder_fd, key)
            if meeting:
                return meeting
            handed = _hand_over(folder_fd, tree, key, left)
            if handed is not None:
                return handed
            time.sleep(_AGAIN_S)  # the other one is just coming or going
        return False
    except OSError:
        return False  # a folder without locks or sockets, or another one that does not answer
    finally:
        if not meeting:
            os.close(folder_fd)


def _hand_over(folder_fd: int, tree: Tree, key: bytes, patience_s: float) -> bool | None:
    """Hand a tree over; False where the other will not have it, None where nobody listens. Raises OSError (TimeoutError: no answer)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.settimeout(patience_s)
        try:
            other.connect(_address(folder_fd))
            # Nothing is sent before the other was heard: copies in the queue of one that is stopped would keep the owner's socket open.
            its_key = other.recv(_MESSAGE_BYTES)
        except (FileNotFoundError, ConnectionError):
            return None
        if not its_key:
            return None
        if its_key != key or not _is_ours(other):
            return False
        socket.send_fds(other, [tree.said], [tree.control.fileno(), tree.listener.fileno()])
        if other.recv(_MESSAGE_BYTES) != _TAKEN:
            return False
        other.send(_YOURS)  # refused once the other has given up
        return True


# Who takes over


def take(other: socket.socket, key: bytes) -> Tree | None:
    """Take a tree over from who has connected; None where that fails, and then nothing of it is kept."""
    fds: list[int] = []
    try:
        if not _is_ours(other):
            return None
        other.settimeout(_OFFER_S)
        other.send(key)
        said, fds, flags, _ = socket.recv_fds(other, _MESSAGE_BYTES, 2)
        if len(fds) != 2 or flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            return None  # it has gone, or we have no descriptors left
        other.send(_TAKEN)
        if _last_word(other) != _YOURS:
            return None
        for fd in fds:
            os.set_inheritable(fd, False)
        tree = Tree(socket.socket(fileno=fds[0]), socket.socket(fileno=fds[1]), said)
        fds = []
        return tree
    except OSError:
        return None
    finally:
        for fd in fds:
            os.close(fd)


def _last_word(other: socket.socket) -> bytes:
    try:
        return other.recv(_MESSAGE_BYTES)
    except TimeoutError:
        # From here on it cannot be said any more, so what was said until now is all.
        other.shutdown(socket.SHUT_RD)
        return other.recv(_MESSAGE_BYTES)


# Serving


def serve(tree: Tree, others: Callable[[], int] = lambda: 0) -> None:
    """Serve one tree until every page is in place or its owner is gone. A failure is told to the owner, and nothing stays open.

    `others`: how many more trees this process serves, which the owner is told at the end. Raises what no image and no process can cause.
    """
    daemon: Daemon | None = None
    try:
        from checkpoint.lazy_pages.fault_handler import Daemon  # imported by now, but for who serves alone

        daemon = Daemon(tree.control, tree.listener, tree.config, tree.reading or Reading.begun(tree.config))
        daemon.run()
    except (OSError, RuntimeError, ValueError) as error:
        _tell(tree.control, event="failed", message=str(error))
    except Exception as error:
        _tell(tree.control, event="failed", message=repr(error))
        raise
    finally:
        _tell(tree.control, event="over", others=others())
        with contextlib.suppress(OSError):
            # The owner hears it whoever else may have a copy.
            tree.control.shutdown(socket.SHUT_RDWR)
        tree.close()
        if daemon:
            daemon.close()


def _tell(control: socket.socket, **message: object) -> None:
    with contextlib.suppress(OSError):  # the owner is gone
        control.send(json.dumps(message).encode())


class Host:
    """The host's server: the first tree has the process's first thread, as one that is served alone; every other tree has its own."""

    def __init__(self, meeting: Meeting) -> None:
        self._meeting = meeting
        self._serving: set[Tree] = set()
        self._ended: deque[Tree] = deque()
        self._over = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def run(self, first: Tree) -> None:
        """Serve until no tree is left."""
        self._serving.add(first)
        keeper = threading.Thread(target=self._keep, name="meeting", daemon=True)
        try:
            keeper.start()
        except RuntimeError:  # no more threads
            self._meeting.close()
            serve(first)
            return
        try:
            self._serve(first)
        finally:
            keeper.join()  # whatever became of the first, the others are served to their end

    def _keep(self) -> None:
        """Take trees over until none is left; only this thread counts them, so that none can come after the last."""
        poll = select.poll()
        poll.register(self._over, select.POLLIN)
        poll.register(self._meeting.listener, select.POLLIN)
        while self._serving:
            for fd, _ in poll.poll():
                if fd == self._over:
                    os.eventfd_read(fd)
                    while self._ended:
                        self._serving.discard(self._ended.popleft())
                elif tree := self._taken():
                    self._start(tree)
        self._meeting.close()

    def _taken(self) -> Tree | None:
        try:
            other, _ = self._meeting.listener.accept()
        except OSError:
            time.sleep(_AGAIN_S)  # no descriptor left, or who came has gone: the others are served all the same
            return None
        with other:
            return take(other, self._meeting.key)

    def _start(self, tree: Tree) -> None:
        self._serving.add(tree)
        try:
            threading.Thread(target=self._serve, args=(tree,), name="tree", daemon=True).start()
        except RuntimeError as error:  # no more threads
            self._serving.discard(tree)
            _tell(tree.control, event="failed", message=str(error))
            tree.close()

    def _serve(self, tree: Tree) -> None:
        try:
            serve(tree, lambda: len(self._serving) - len(self._ended) - 1)
        finally:
            self._ended.append(tree)
            os.eventfd_write(self._over, 1)


def main(control_fd: int) -> int:
    """Wait to be told what to serve; serve it, or hand it over. The first message carries the listening socket."""
    control = socket.socket(fileno=control_fd)
    os.set_inheritable(control_fd, False)
    # It ends when its owners do, and these stop in order; what a terminal or a service manager sends to all of them is not for it.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        # The restored processes wait for this one, whatever else the host computes. Threads begin with the same.
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    try:
        said, fds, _, _ = socket.recv_fds(control, _MESSAGE_BYTES, 1)
    except ConnectionResetError:
        said, fds = b"", []
    if not said:
        return 0  # started beforehand (checkpoint.sandbox.prestart), and not needed, or its owner was killed
    os.set_inheritable(fds[0], False)
    tree = Tree(control, socket.socket(fileno=fds[0]), said)
    # Thousands of tuples that all live on: collecting would find nothing, several times. A tree that is over leaves no cycle.
    gc.disable()
    # Before even the rest of this program: the disk's queue is filled in the order of need.
    sys.setswitchinterval(_TURN_S)
    tree.reading = Reading.begun(tree.config)
    import checkpoint.lazy_pages.fault_handler  # noqa: F401

    meeting = meet(str(tree.config.get("meeting", "")), tree)
    if isinstance(meeting, Meeting):
        Host(meeting).run(tree)
    elif not meeting:
        serve(tree)
    return 0
