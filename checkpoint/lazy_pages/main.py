"""The page server's process: one per host (per state folder of a user), which serves every process tree being restored.

It is run as `python -I -S -c '…main(control)'`, or forked, by checkpoint.sandbox.prestart. It uses only the standard
library and starts in 25 ms, in parallel with CRIU.

A process starts before its configuration is known. When it receives one, it tries to become the host's server: it
takes a lock in the rendezvous folder and listens beside it. If another process holds the lock, it hands its tree off
to that server (the control socket, the listener that CRIU connects to, the owner's configuration) and exits. If the
handoff fails, it serves the tree itself, alone. So a single restore only pays for an uncontended lock.

Guarantees:
- Exactly one process serves a tree. The receiver begins after the last message of the handoff, and that message
  cannot be sent once the receiver has given up.
- Each tree has its own Daemon and its own loop thread, and shares no table with another tree (fault_handler explains
  why that cannot corrupt memory). A failure in one tree is reported to its owner and closes its descriptors; the
  other trees are unaffected.
- A server ends a tree by closing the control socket, after it has reported any failure. If the process is killed,
  all control sockets close.
- The process exits when no tree is left. It first stops listening and releases the lock, so a later process can take
  the lock.
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

from checkpoint.lazy_pages.read_order import Reading

TYPE_CHECKING = False  # importing typing would delay a restore by 3 ms
if TYPE_CHECKING:
    from checkpoint.lazy_pages.fault_handler import Daemon

LOCK_NAME = "page-server.lock"
SOCKET_NAME = "page-server.socket"
_ANSWER_S = 0.1
"""Total handoff timeout, seconds. It is short because the sender has a restore to serve."""
_OFFER_S = 0.05
"""Timeout of the host's server for each handoff message, seconds. Other senders may be queued."""
_AGAIN_S = 0.001
_MESSAGE_BYTES = 1 << 16
_WAITING = 64
# Thread switch interval, seconds. With the default, a fault would wait 5 ms for another tree's planning, and the disk
# for our imports.
_TURN_S = 0.0005
_TAKEN, _YOURS = b"taken", b"yours"


class Tree:
    """A process tree to serve. `said` is the owner's configuration (JSON, see Daemon)."""

    def __init__(self, control: socket.socket, listener: socket.socket, said: bytes) -> None:
        self.control = control
        self.listener = listener
        self.said = said
        self.reading: Reading | None = None
        """Set once the disk reads have been requested."""

    @property
    def config(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.said)
        return found

    def close(self) -> None:
        """Close our copies; a server that took the tree over has its own."""
        self.control.close()
        self.listener.close()


def code_key() -> bytes:
    """Identify everything that must match for a handoff: code, interpreter, and the mount, pid and user namespaces."""
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
        """Become the host's server; return None if another process is. Raises OSError."""
        lock_fd = os.open(LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder_fd)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(SOCKET_NAME, dir_fd=folder_fd)  # a killed server's
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
        """Stop being the host's server. Processes queued for a handoff see their connection close."""
        with contextlib.suppress(OSError):  # the folder was removed
            os.unlink(SOCKET_NAME, dir_fd=self._folder_fd)
        self.listener.close()
        os.close(self._lock_fd)


def _address(folder_fd: int) -> str:
    """Return a short socket address.

    It names the folder by its descriptor, because socket names are limited to 108 bytes.
    """
    return f"/proc/self/fd/{folder_fd}/{SOCKET_NAME}"


def _is_ours(other: socket.socket) -> bool:
    """Return whether the peer's process belongs to the same user."""
    _, user, _ = struct.unpack("3i", other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return bool(user == os.getuid())


# Sender of a handoff


def meet(folder: str, tree: Tree) -> Meeting | bool:
    """Become the host's server or hand the tree off.

    Returns the Meeting if this process is the host's server now, True if the tree was handed off, False if it must
    be served alone.
    """
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
            time.sleep(_AGAIN_S)  # the other server is just starting or ending
        return False
    except OSError:
        return False  # the folder supports no locks or sockets, or the other server does not answer
    finally:
        if not meeting:
            os.close(folder_fd)


def _hand_over(folder_fd: int, tree: Tree, key: bytes, patience_s: float) -> bool | None:
    """Hand a tree off.

    Return False if the server rejects it, None if no server listens. Raises OSError (TimeoutError: no answer).
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.settimeout(patience_s)
        try:
            other.connect(_address(folder_fd))
            # Send nothing before the server's key arrives: copies queued at a stopped server would keep the owner's
            # socket open.
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
        other.send(_YOURS)  # fails once the server has given up
        return True


# Receiver of a handoff


def take(other: socket.socket, key: bytes) -> Tree | None:
    """Take over a tree from a connected process. Return None on failure, with all its descriptors closed."""
    fds: list[int] = []
    try:
        if not _is_ours(other):
            return None
        other.settimeout(_OFFER_S)
        other.send(key)
        said, fds, flags, _ = socket.recv_fds(other, _MESSAGE_BYTES, 2)
        if len(fds) != 2 or flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            return None  # the peer is gone, or no descriptors are left
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
        # After this, the peer cannot send any more; what it sent before can still be read.
        other.shutdown(socket.SHUT_RD)
        return other.recv(_MESSAGE_BYTES)


# Serving


def serve(tree: Tree, others: Callable[[], int] = lambda: 0) -> None:
    """Serve one tree until every page is in place or its owner is gone.

    Report a failure to the owner and close all descriptors. `others` counts the other trees that this process serves;
    the owner receives it at the end. Re-raises exceptions that no image and no process can cause.
    """
    daemon: Daemon | None = None
    try:
        from checkpoint.lazy_pages.fault_handler import Daemon  # already imported, except when serving alone

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
            # The owner sees the end even if another process holds a copy of the socket.
            tree.control.shutdown(socket.SHUT_RDWR)
        tree.close()
        if daemon:
            daemon.close()


def _tell(control: socket.socket, **message: object) -> None:
    with contextlib.suppress(OSError):  # the owner is gone
        control.send(json.dumps(message).encode())


class Host:
    """The host's server.

    The first tree uses the main thread, as a tree served alone does; every other tree has its own thread.
    """

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
            keeper.join()  # serve the other trees to their end, however the first one ended

    def _keep(self) -> None:
        """Take over trees until none is left.

        Only this thread counts them, so no tree can be added after the last one ended.
        """
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
            time.sleep(_AGAIN_S)  # no descriptors left, or the peer is gone; the other trees are unaffected
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
    """Receive a configuration and serve the tree or hand it off.

    The first message carries the listening socket.
    """
    control = socket.socket(fileno=control_fd)
    os.set_inheritable(control_fd, False)
    # The server ends when its owners do, in order. Ignore signals that a terminal or a service manager sends to the
    # whole group.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        # Restored processes wait for this process, so raise its priority. New threads inherit it.
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    try:
        said, fds, _, _ = socket.recv_fds(control, _MESSAGE_BYTES, 1)
    except ConnectionResetError:
        said, fds = b"", []
    if not said:
        return 0  # prestarted (checkpoint.sandbox.prestart) and not needed, or the owner was killed
    os.set_inheritable(fds[0], False)
    tree = Tree(control, socket.socket(fileno=fds[0]), said)
    # The thousands of tuples all stay alive, so collections would find nothing; an ended tree leaves no cycles.
    gc.disable()
    # Request the disk reads before even importing the rest, so the disk's queue is filled in the order of need.
    sys.setswitchinterval(_TURN_S)
    tree.reading = Reading.begun(tree.config)
    import checkpoint.lazy_pages.fault_handler  # noqa: F401

    meeting = meet(str(tree.config.get("meeting", "")), tree)
    if isinstance(meeting, Meeting):
        Host(meeting).run(tree)
    elif not meeting:
        serve(tree)
    return 0
