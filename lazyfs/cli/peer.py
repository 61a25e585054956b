"""The command `quickthaw peer`: serve this host's verified chunks to others."""

from __future__ import annotations

import ipaddress
import json
import logging
import signal
import sys
import threading

import click

from lazyfs.cli.options import (
    json_option,
    option,
    peer_options,
    reports_errors,
    store_option,
)
from lazyfs.errors import Usage, os_errors


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@click.command()
@option(
    "--listen",
    default=":9470",
    show_default=True,
    envvar="QUICKTHAW_PEER_LISTEN",
    metavar="HOST:PORT",
    help="Where to listen. :9470 is every interface.",
)
@option(
    "--memory-mb",
    type=click.IntRange(0),
    default=1024,
    show_default=True,
    envvar="QUICKTHAW_PEER_MEMORY_MB",
    help="Megabytes of chunks in memory at most: under way, being sent, and kept for others. 0: serve only what is on disk.",
)
@peer_options
@store_option
@json_option
@reports_errors
def peer(
    listen: str, memory_mb: int, peers: str, peer_token: str, peer_self: str, store: str | None, as_json: bool
) -> None:
    """Serve the chunks that this host has to others, and fetch each chunk that it is asked for first from the store, once.

    One runs on each host of a fleet, with the same --store, --peers and --peer-token as that host's mounts. Whoever
    has the token can read every model in the cache and in the store. The connection is not encrypted: keep it inside the fleet's network.

    \b
    quickthaw peer --store s3://bucket/weights --peers dns://quickthaw-peers:9470
    quickthaw mount llama:v1 /mnt/llama --store s3://bucket/weights --peers dns://quickthaw-peers:9470
    """
    from lazyfs.cache.bound import AUTO
    from lazyfs.cache.cache import WATCH_S, Cache
    from lazyfs.cache.open_sparse_files import raise_descriptor_limit
    from lazyfs.content.chunk_store import ChunkStore
    from lazyfs.logs import configure
    from lazyfs.paths import default_store_url, home
    from lazyfs.peers.client import Peers
    from lazyfs.peers.order import Members
    from lazyfs.peers.server import Chunks, PeerServer
    from lazyfs.stores import open_store

    host, _, port = listen.rpartition(":")
    host = host.strip("[]") or "0.0.0.0"
    if not port.isdecimal() or int(port) > 65535:
        raise click.UsageError(f"--listen {listen!r} is not HOST:PORT, such as 127.0.0.1:9470 or :9470")
    if not peer_token.strip() and not _is_loopback(host):
        raise Usage(f"{listen} is reached by others: give --peer-token, or listen on 127.0.0.1", code="peer-token")
    configure("peer")
    # As in a mount's daemon: many threads need the interpreter briefly, and the heartbeat must not wait for all of them.
    sys.setswitchinterval(0.0005)
    raise_descriptor_limit()  # every host of the fleet keeps connections
    above = Peers(Members(peers, peer_self), peer_token) if peers else None
    cache = Cache(home() / "cache", AUTO)
    chunks = Chunks(cache.root, ChunkStore(open_store(store or default_store_url())), memory_mb << 20, above)
    with os_errors(f"cannot listen on {listen}"):
        server = PeerServer((host, int(port)), peer_token, chunks)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    server.start()
    where = f"{server.address[0]}:{server.address[1]}"
    click.echo(json.dumps({"address": where}) if as_json else f"ready: serving chunks at {where}")
    while not stop.wait(WATCH_S):
        server.repeats.tick()
        try:
            cache.watch()
        except OSError as error:
            server.repeats.log(logging.WARNING, "disk", f"cannot watch the disk of {cache.root}: {error}")
    server.close()
    click.echo(
        json.dumps(server.counters()) if as_json else " ".join(f"{k}: {v}" for k, v in server.counters().items())
    )
