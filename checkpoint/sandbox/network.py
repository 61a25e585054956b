"""Enter a sandbox's network for a moment, to make a socket or look at a table there, and close the connections that leave it.

A socket belongs to the namespace it was created in, so a thread enters the namespace, creates it, and returns.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import socket
import struct
from collections.abc import Collection, Iterator

from checkpoint.errors import Failed, HostLacks

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
ADDRESS = "10.0.2.100"
"""Address of a sandbox with a way out, before a dump and after a restore."""

# sock_diag(7), linux/inet_diag.h, linux/netlink.h
_NETLINK_SOCK_DIAG, _BY_FAMILY, _DESTROY = 4, 20, 21
_REQUEST, _DUMP, _ACK = 1, 0x300, 4
_DONE, _ERROR = 3, 2
_HEADER = struct.Struct("=IHHII")
_ASKED = struct.Struct("=BBBxI")
_FOUND = struct.Struct("=BBBB")
_SOCKET_ID = struct.Struct("!HH16s16sI8s")
_LISTEN, _TIME_WAIT, _CLOSED = 10, 6, 7


@functools.cache
def own_network() -> int:
    """Return a descriptor of this process's network namespace, which stays open until the process ends.

    Raises HostLacks (sandbox-network) if a thread that entered a sandbox's network could not return: in a user
    namespace without its own network.
    """
    fd = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    if _libc.setns(fd, _CLONE_NEWNET):  # a no-op for this thread that tests the permission
        error = ctypes.get_errno()
        os.close(fd)
        raise HostLacks(
            "sandbox-network",
            f"cannot enter this host's network namespace ({os.strerror(error)}); "
            "run as root with CAP_SYS_ADMIN outside of a user namespace",
        )
    return fd


@contextlib.contextmanager
def inside(network: int) -> Iterator[None]:
    """Let this thread be in the network of this descriptor; the two calls take about 10 µs.

    Raises Failed (sandbox-gone), and HostLacks (sandbox-network) if the thread cannot return.
    """
    home = own_network()
    if _libc.setns(network, _CLONE_NEWNET):
        raise Failed("sandbox-gone", "the sandbox's network is gone")
    try:
        yield
    finally:
        back = _libc.setns(home, _CLONE_NEWNET)
        if back:  # it worked in own_network, so this process has lost a privilege since
            raise HostLacks(
                "sandbox-network",
                "cannot leave the sandbox's network any more; keep CAP_SYS_ADMIN for this process",
            )


def close_outgoing(network: int, host_ports: Collection[int] = ()) -> int:
    """Close every TCP connection with a peer outside of a sandbox, and return their number: no snapshot can hold one.

    `host_ports`: ports of loopback behind which the host's processes are. The engine's processes see an aborted connection,
    as if the peer had ended it. Raises OSError, and Failed (sandbox-gone).
    """
    with inside(network):
        netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG)
    closed = 0
    with netlink:
        netlink.settimeout(5.0)
        states = 0xFFF & ~(1 << _LISTEN | 1 << _TIME_WAIT | 1 << _CLOSED)
        for family in (socket.AF_INET, socket.AF_INET6):
            for ident in _connections(netlink, family, states):
                own, peer, _, address, _, _ = _SOCKET_ID.unpack(ident)
                if not _stays(family, address) or not {own, peer}.isdisjoint(host_ports):
                    closed += _destroy(netlink, family, ident, states)
    return closed


def _connections(netlink: socket.socket, family: int, states: int) -> list[bytes]:
    """Return the identifiers of all TCP sockets in these states."""
    body = _ASKED.pack(family, socket.IPPROTO_TCP, 0, states) + bytes(_SOCKET_ID.size)
    netlink.send(_HEADER.pack(_HEADER.size + len(body), _BY_FAMILY, _REQUEST | _DUMP, 0, 0) + body)
    found: list[bytes] = []
    while True:
        data = netlink.recv(1 << 16)
        while len(data) >= _HEADER.size:
            size, kind, _, _, _ = _HEADER.unpack_from(data)
            if kind == _DONE:
                return found
            if kind == _ERROR:
                raise _error(data)
            start = _HEADER.size + _FOUND.size
            found.append(data[start : start + _SOCKET_ID.size])
            data = data[(size + 3) & ~3 :]


def _destroy(netlink: socket.socket, family: int, ident: bytes, states: int) -> int:
    """Close one socket; return 0 if it has ended meanwhile."""
    body = _ASKED.pack(family, socket.IPPROTO_TCP, 0, states) + ident
    netlink.send(_HEADER.pack(_HEADER.size + len(body), _DESTROY, _REQUEST | _ACK, 0, 0) + body)
    error = _error(netlink.recv(1 << 16))
    if error.errno in (0, errno.ENOENT):
        return int(not error.errno)
    raise error


def _error(data: bytes) -> OSError:
    number = -struct.unpack_from("=i", data, _HEADER.size)[0]
    return OSError(number, os.strerror(number))


def _stays(family: int, address: bytes) -> bool:
    """Return whether an address of a connection's peer, as the kernel gives it, is in the sandbox."""
    return is_inside(address[:4] if family == socket.AF_INET else address)


def is_inside(address: bytes) -> bool:
    """Return whether an address of 4 or 16 bytes is the sandbox's own: loopback, or with a way out its one; or none."""
    import ipaddress  # needed where there is a way out only

    found = ipaddress.ip_address(address)
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    own = mapped or found
    return own.is_loopback or own.is_unspecified or str(own) == ADDRESS
