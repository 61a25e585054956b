"""The sockets that a launch listens on: bind them, and print their addresses."""

from __future__ import annotations

import errno
import logging
import socket

from launchers.errors import Usage

log = logging.getLogger("quickthaw")
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


def refused(host: str, port: int, error: OSError, remedy: str) -> str:
    """Return why an address cannot be listened on, with the remedy, in one line."""
    return f"cannot listen on {host}:{port}; {_REASONS.get(error.errno or 0, error.strerror or error)}; {remedy}"


def url(sock: socket.socket) -> str:
    """Return the URL of a listening socket, with the port that the kernel chose for port 0, or `unix:` and its path."""
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def announcement(sock: socket.socket, admin_sock: socket.socket | None, admin_prefix: str) -> str:
    """Return the log line that names the served address and the admin page."""
    return f"listening on {url(sock)} (admin page: {url(admin_sock or sock)}{admin_prefix}/)"
