"""Which hosts are asked for a chunk, in which order: rendezvous hashing, the same on every host without any agreement.

Each host ranks all peers for a chunk. The first one fetches it from the store; every other one asks a host of a lower rank, so
that the chunk spreads along a tree in which each host sends it to at most `FANOUT` others. Ranks differ from chunk to chunk,
so every host sends about as much as it receives. When a host leaves, the trees change only where it was.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from lazyfs.errors import Usage

log = logging.getLogger("lazyfs.peers.order")
DEFAULT_PORT = 9470
FANOUT = 2
# Peers asked for one chunk before the store.
_ASKED = 4
# How often a DNS name is asked again for its addresses, seconds.
_REFRESH_S = 10.0


@dataclass(frozen=True, order=True)
class Address:
    """A peer's host (without brackets) and port. Its text is its identity: every host must name it in the same way."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_peers(text: str) -> tuple[tuple[Address, ...], tuple[Address, ...]]:
    """Read a list of peers, separated by commas: HOST[:PORT], or dns://NAME[:PORT] for every address of a name.

    Return (addresses, names to resolve). Raises Usage.
    """
    fixed: list[Address] = []
    names: list[Address] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        (names if word.startswith("dns://") else fixed).append(_address(word.removeprefix("dns://"), text))
    return tuple(dict.fromkeys(fixed)), tuple(dict.fromkeys(names))


def _address(word: str, text: str) -> Address:
    host, port = word, ""
    if word.startswith("["):
        host, _, rest = word[1:].partition("]")
        port = rest.removeprefix(":")
    elif word.count(":") == 1:
        host, _, port = word.partition(":")
    if not host or "/" in host or (port and not (port.isdecimal() and 0 < int(port) < 65536)):
        raise Usage(f"{text!r} is not a list of peers; write HOST:PORT,HOST:PORT or dns://NAME:PORT")
    return Address(host, int(port) if port else DEFAULT_PORT)


def ranked(digest: str, peers: Sequence[Address]) -> list[Address]:
    """Return the peers in the order in which they are asked for a chunk."""
    key = digest.encode()
    return sorted(peers, key=lambda peer: blake2b(str(peer).encode(), key=key[:64], digest_size=8).digest())


def sources(digest: str, peers: Sequence[Address], me: Address | None) -> list[Address]:
    """Return whom the host `me` asks for a chunk before the store: its parent in the chunk's tree, those above it, the lowest ranks.

    All of them have a lower rank, so nobody waits in a circle; the first one, and whoever finds nobody, asks the store. A host that
    does not know its own address asks the first ranks.
    """
    order = ranked(digest, peers)
    if me not in order:
        return order[:_ASKED]
    found, at = [], order.index(me)
    lower = order[:at]
    while at > 0:
        at = (at - 1) // FANOUT
        found.append(order[at])
    return list(dict.fromkeys([*found, *lower]))[:_ASKED]


def own_address(peers: Sequence[Address]) -> Address | None:
    """Return the one peer whose address is of this host, or None if none or several are."""
    own = [peer for peer in peers if _is_local(peer)]
    return own[0] if len(own) == 1 else None


def _is_local(peer: Address) -> bool:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(peer.host, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)  # only an address of this host can be bound
            return True
    except OSError:
        return False


class Members:
    """The peers of a fleet as they are now. Names are resolved in a thread, so that no fetch waits for DNS."""

    def __init__(self, text: str, me: str = "") -> None:
        self._me = parse_peers(me)[0][0] if me else None
        self._fixed, self._names = parse_peers(text)
        self._now = self._fixed
        self._looked: tuple[Address, ...] = ()
        self._found: Address | None = None
        self._ended = threading.Event()
        if self._names:
            self._resolve()
            threading.Thread(target=self._refresh, name="peers", daemon=True).start()

    @property
    def now(self) -> tuple[Address, ...]:
        """Return the current peers."""
        return self._now

    @property
    def me(self) -> Address | None:
        """Return this host's own address among the peers: the given one, else the only one that is of this host."""
        if self._me is None and self._now is not self._looked:
            self._looked, self._found = self._now, own_address(self._now)
        return self._me or self._found

    def close(self) -> None:
        """Stop asking for the addresses of names."""
        self._ended.set()

    def _refresh(self) -> None:
        while not self._ended.wait(_REFRESH_S):
            self._resolve()

    def _resolve(self) -> None:
        found = list(self._fixed)
        for name in self._names:
            began = time.monotonic()
            try:
                answers = socket.getaddrinfo(name.host, name.port, type=socket.SOCK_STREAM)
            except OSError as error:
                # As they were: a name server that fails must not make every host ask the store.
                log.warning("the peers of %s are as before: %s (%.1f s)", name, error, time.monotonic() - began)
                return
            found += [Address(str(answer[4][0]), name.port) for answer in answers]
        self._now = tuple(dict.fromkeys(found))
