"""Which hosts are asked for a chunk, in which order: rendezvous hashing, the same on every host without any agreement.

Each host ranks all peers for a chunk. The first one fetches it from the store; every other one asks a host of a lower rank, so
that the chunk spreads along a tree in which each host sends it to at most `FANOUT` others. Ranks differ from chunk to chunk,
so every host sends about as much as it receives. When a host leaves, the trees change only where it was.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

from lazyfs.errors import Usage
from lazyfs.logs import RepeatLimiter
from lazyfs.peers.endpoint_slices import SCHEME, EndpointSlices, Service, parse_service

log = logging.getLogger("lazyfs.peers.order")
DEFAULT_PORT = 9470
FANOUT = 2
# Peers asked for one chunk before the store.
_ASKED = 4
# How often a name is asked again for its addresses, and how long a start waits for the first answers, seconds.
_REFRESH_S, _FIRST_S = 10.0, 1.0


@dataclass(frozen=True, order=True)
class Address:
    """A peer's host (without brackets) and port. Its text is its identity: every host must name it in the same way."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class PeerList(NamedTuple):
    """What --peers names: addresses, names whose every address is a peer, Services of Kubernetes."""

    addresses: tuple[Address, ...] = ()
    names: tuple[Address, ...] = ()
    services: tuple[Service, ...] = ()


def parse_peers(text: str) -> PeerList:
    """Read a list of peers, separated by commas: HOST[:PORT], dns://NAME[:PORT] for every address of a name, or
    k8s://NAMESPACE/SERVICE[:PORT] for every ready endpoint of a Service.

    Raises Usage.
    """
    fixed: list[Address] = []
    names: list[Address] = []
    services: list[Service] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        if word.startswith(SCHEME):
            services.append(parse_service(word))
        else:
            (names if word.startswith("dns://") else fixed).append(_address(word.removeprefix("dns://"), text))
    return PeerList(tuple(dict.fromkeys(fixed)), tuple(dict.fromkeys(names)), tuple(dict.fromkeys(services)))


def parse_address(text: str) -> Address | None:
    """Read one address: HOST[:PORT]; None for an empty text. Raises Usage."""
    fixed, *others = parse_peers(text)
    if any(others) or len(fixed) > 1:
        raise Usage(f"{text!r} is not one address; write HOST:PORT")
    return fixed[0] if fixed else None


def _address(word: str, text: str) -> Address:
    host, port = word, ""
    if word.startswith("["):
        host, _, rest = word[1:].partition("]")
        port = rest.removeprefix(":")
    elif word.count(":") == 1:
        host, _, port = word.partition(":")
    if not host or "/" in host or (port and not (port.isdecimal() and 0 < int(port) < 65536)):
        raise Usage(
            f"{text!r} is not a list of peers; write HOST:PORT,HOST:PORT, dns://NAME:PORT or k8s://NAMESPACE/SERVICE"
        )
    return Address(host, int(port) if port else DEFAULT_PORT)


def ranked(digest: str, peers: Sequence[Address]) -> list[Address]:
    """Return the peers in the order in which they are asked for a chunk."""
    key = digest.encode()
    return sorted(peers, key=lambda peer: blake2b(str(peer).encode(), key=key[:64], digest_size=8).digest())


def sources(digest: str, peers: Sequence[Address], me: Address | None, *, serves: bool = True) -> list[Address]:
    """Return whom the host `me` asks for a chunk before the store: its parent in the chunk's tree, those above it, the lowest ranks.

    All of them have a lower rank, so nobody waits in a circle; the first one, and whoever finds nobody, asks the store. Whoever does
    not serve (a mount whose own server is gone) asks higher ranks at last: a chunk of which its host is the first one is theirs now.
    A host that does not know its own address asks the first ranks.
    """
    order = ranked(digest, peers)
    if me not in order:
        return order[:_ASKED]
    found, at = [], order.index(me)
    lower = order[:at]
    while at > 0:
        at = (at - 1) // FANOUT
        found.append(order[at])
    return list(dict.fromkeys([*found, *lower, *(() if serves else order[order.index(me) + 1 :])]))[:_ASKED]


def own_address(
    peers: Sequence[Address], place: Callable[[Address], str | None] = lambda peer: peer.host
) -> Address | None:
    """Return the one peer whose address is of this host, or None if none or several are. `place`: where each is."""
    own = [peer for peer in peers if _is_local(place(peer))]
    return own[0] if len(own) == 1 else None


def _is_numeric(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_local(host: str | None) -> bool:
    if host is None:
        return False
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)[
            0
        ]
        with socket.socket(family, kind) as probe:
            probe.bind(address)  # only an address of this host can be bound
            return True
    except OSError:
        return False


class Members:
    """The peers of a fleet as they are now. Names are resolved and Services followed in threads, so that no fetch waits for them."""

    def __init__(self, text: str, me: str = "") -> None:
        self._me = parse_address(me)
        self._fixed, self._names, services = parse_peers(text)
        self._now = self._fixed
        self._places: dict[str, str] = {}
        self._found: Address | None = None
        self._of_names: list[Address] = []
        self._of_services: dict[Service, list[Address]] = {}
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._repeats = RepeatLimiter(log, every_s=600.0)
        deadline = time.monotonic() + _FIRST_S
        first: list[threading.Event] = []
        self._slices = [self._follow(service, first) for service in services]
        if self._names or not all(_is_numeric(peer.host) for peer in self._fixed):
            first.append(threading.Event())
            threading.Thread(target=self._refresh, args=(first[-1],), name="peers", daemon=True).start()
        else:
            self._update()
        for answer in first:
            answer.wait(max(0.0, deadline - time.monotonic()))

    @property
    def now(self) -> tuple[Address, ...]:
        """Return the current peers."""
        return self._now

    @property
    def me(self) -> Address | None:
        """Return this host's own address among the peers: the given one, else the only one that is of this host."""
        return self._me or self._found

    def place(self, peer: Address) -> str | None:
        """Return the numeric address of a peer, or None as long as its name has none."""
        return peer.host if _is_numeric(peer.host) else self._places.get(peer.host)

    def close(self) -> None:
        """Stop asking for the addresses of names, and following Services."""
        self._ended.set()
        for one in self._slices:
            one.close()

    def _follow(self, service: Service, first: list[threading.Event]) -> EndpointSlices:
        answered = threading.Event()
        first.append(answered)

        def changed(found: list[tuple[str, int]]) -> None:
            self._of_services[service] = [Address(host, port) for host, port in found]
            self._update()
            answered.set()

        return EndpointSlices(service, DEFAULT_PORT, changed)

    def _update(self) -> None:
        with self._lock:
            services = [peer for found in list(self._of_services.values()) for peer in found]
            self._now = tuple(dict.fromkeys([*self._fixed, *self._of_names, *services]))
            self._found = own_address(self._now, self.place)

    def _refresh(self, first: threading.Event) -> None:
        while True:
            self._resolve()
            first.set()
            if self._ended.wait(_REFRESH_S):
                return

    def _resolve(self) -> None:
        try:
            self._of_names = [Address(place, name.port) for name in self._names for place in _of_one_family(name)]
        except OSError as error:
            # As they were: a name server that fails must not make every host ask the store.
            self._repeats.log(logging.WARNING, "names", f"the peers are as before: {error}")
        self._update()
        for peer in self._fixed:
            if not _is_numeric(peer.host) and not self._ended.is_set():
                try:
                    self._places[peer.host] = _of_one_family(peer)[0]
                except OSError as error:
                    self._repeats.log(logging.WARNING, str(peer), f"peer {peer} is where it was: {error}")
        self._update()


def _of_one_family(name: Address) -> list[str]:
    """Return the IPv4 addresses of a name, else the others: a host with one of each is one peer, and servers listen on IPv4 by default.

    Raises OSError.
    """
    places = _places(name)
    return [place for place in places if ":" not in place] or places


def _places(name: Address) -> list[str]:
    """Return the addresses of a name. Raises OSError, which tells the name and how long it took."""
    began = time.monotonic()
    try:
        return [str(answer[4][0]) for answer in socket.getaddrinfo(name.host, name.port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:  # UnicodeError: of a name that DNS cannot have
        raise OSError(f"{name}: {error} ({time.monotonic() - began:.1f} s)") from error
