"""The sockets that a launch listens on: bind them, and print their addresses."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from launchers.errors import Usage
from lazyfs.paths import flock_within

if TYPE_CHECKING:
    from launchers.base import EngineCommand

log = logging.getLogger("quickthaw")
_LOCK_S = 5.0
_BOUND = Path("/proc/net/unix")
_REASONS = {
    errno.EADDRINUSE: "another process listens there",
    errno.EACCES: "this user lacks the privilege to bind it",
    errno.EADDRNOTAVAIL: "this host has no such address",
}


def bind(host: str, port: int, remedy: str = "choose another port") -> socket.socket:
    """Bind a port and return the listening socket. `remedy` is the end of the error message.

    Raises Usage (port-in-use) when the port is taken, needs privileges, or the host has no such address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(4096)
    except OSError as error:
        sock.close()
        raise Usage("port-in-use", refused(host, port, error, remedy)) from error
    return sock


@contextlib.contextmanager
def bind_front(command: EngineCommand, remedy: str) -> Iterator[socket.socket]:
    """Listen where the engine of a command line would; a UNIX socket's file is removed at the end.

    Raises Usage (port-in-use, socket-in-use).
    """
    if not command.uds:
        with bind(command.host, command.port, remedy) as sock:
            yield sock
        return
    file = Path(command.uds)
    sock = bind_unix(file)
    made = file.stat()
    try:
        with sock:
            yield sock
    finally:
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(file.lstat(), made):
                file.unlink()


def bind_unix(path: Path) -> socket.socket:
    """Bind a UNIX socket and return it, listening; its mode is that of the umask, as with vLLM.

    A socket that a killed process left there is replaced. Raises Usage (socket-in-use).
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _locked(path.parent) as locked:  # two launches must not both find the same file left behind
            if locked and _left_behind(path):
                path.unlink()
            sock.bind(str(path))
            sock.listen(4096)
    except OSError as error:
        sock.close()
        cause = _REASONS.get(error.errno or 0, error.strerror or error)
        raise Usage("socket-in-use", f"cannot listen on {path}; {cause}; choose another path with --uds") from error
    return sock


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Lock a folder, and yield whether that worked: it does not over NFS, or while another user keeps it locked."""
    with contextlib.ExitStack() as opened:
        locked = False
        with contextlib.suppress(OSError):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            opened.callback(os.close, fd)
            locked = flock_within(fd, _LOCK_S)
        yield locked


def _left_behind(path: Path) -> bool:
    """Return whether a path is a socket that no process has bound or listens on. Raises OSError."""
    if path.is_symlink() or not path.is_socket():
        return False
    # A socket that is bound and does not listen yet refuses connections, as one that was left behind does.
    bound = _BOUND.read_text(errors="surrogateescape").splitlines()
    if any(_names(line.split(maxsplit=7)[-1], path) for line in bound):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(1.0)
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def _names(bound: str, path: Path) -> bool:
    """Return whether the name of a bound socket may mean this path: it can be relative to any folder, or be another namespace's."""
    name = Path(bound)
    if name.name != path.name:
        return False
    try:
        return not name.is_absolute() or name.samefile(path)
    except OSError:
        return True


def refused(host: str, port: int, error: OSError, remedy: str) -> str:
    """Return why an address cannot be listened on, with the remedy, in one line."""
    return f"cannot listen on {host}:{port}; {_REASONS.get(error.errno or 0, error.strerror or error)}; {remedy}"


def url(sock: socket.socket, encrypted: bool = False) -> str:
    """Return the URL of a listening socket, with the port that the kernel chose for port 0, or `unix:` and its path."""
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    scheme = "https" if encrypted else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def announcement(
    sock: socket.socket, admin_sock: socket.socket | None, admin_prefix: str, encrypted: bool = False
) -> str:
    """Return the log line that names the served address and the admin page."""
    admin = url(admin_sock) if admin_sock else url(sock, encrypted)
    return f"listening on {url(sock, encrypted)} (admin page: {admin}{admin_prefix}/)"
