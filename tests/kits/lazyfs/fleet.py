"""A fleet of hosts on loopback: each has a cache and a peer server of its own, and all have one slow store."""

from __future__ import annotations

import http.server
import os
import socket
import threading
import time
from pathlib import Path

from lazyfs.content.chunk_store import ChunkStore
from lazyfs.fetch.warm import warm
from lazyfs.mount.config import MountConfig
from lazyfs.peers.client import Peers
from lazyfs.peers.order import Members
from lazyfs.peers.server import Chunks, PeerServer
from lazyfs.stores import open_store


class SlowStore:
    """A store over HTTP. Its link carries `rate` bytes a second in all, each answer begins after `delay_s`. `sent`: bytes of chunks."""

    def __init__(
        self, root: Path, rate: float, delay_s: float = 0.02, address: tuple[str, int] = ("127.0.0.1", 0)
    ) -> None:
        self.sent = 0
        self._free_at, self._lock = 0.0, threading.Lock()
        store = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                file = root / self.path.lstrip("/")
                data = file.read_bytes() if file.is_file() else None
                time.sleep(delay_s)
                if data is not None and "/chunks/" in self.path:
                    with store._lock:
                        store.sent += len(data)
                        store._free_at = max(store._free_at, time.monotonic()) + len(data) / rate
                        until = store._free_at
                    time.sleep(max(0.0, until - time.monotonic()))
                self.send_response(404 if data is None else 200)
                self.send_header("Content-Length", str(len(data or b"")))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data or b"")

        self._server = http.server.ThreadingHTTPServer(address, Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class BadPeer:
    """A peer that accepts connections and `does`: stall (says nothing), lie (wrong bytes), half (stops within a body), wait (102 for ever)."""

    def __init__(self, does: str, address: str = "127.0.0.1", port: int = 0) -> None:
        self.does, self.asked = does, 0
        self._socket = socket.create_server((address, port), backlog=256)
        self.address = self._socket.getsockname()
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self._open.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            while head := connection.recv(4096):
                self.asked += 1
                length = int(head.split(b"length=")[1].split(b"&")[0])
                answer = f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n".encode()
                if self.does == "lie":
                    connection.sendall(answer + os.urandom(length))
                elif self.does == "half":
                    connection.sendall(answer + bytes(length // 2))
                elif self.does == "wait":
                    for _ in range(500):
                        connection.sendall(b"HTTP/1.1 102 Processing\r\n\r\n")
                        time.sleep(0.02)
        except OSError:
            return

    def close(self) -> None:
        self._socket.close()
        for connection in self._open:
            connection.close()


def dead_address() -> tuple[str, int]:
    """Return an address at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()


class Host:
    """One host of a fleet: its folder, and its peer server, if it has a good one."""

    def __init__(
        self, folder: Path, store_url: str, token: str, *, serves: bool = True, address: str = "127.0.0.1"
    ) -> None:
        self.folder, self.store_url, self.token = folder, store_url, token
        folder.mkdir()
        self.server: PeerServer | None = None
        self.me = ""
        if serves:
            chunks = Chunks(folder / "cache", ChunkStore(open_store(store_url)), 256 << 20)
            self.server = PeerServer((address, 0), token, chunks)
            self.me = listed(self.server.address)
            self.server.start()

    def knows(self, peers: str) -> None:
        """Let its server ask other peers before the store."""
        if self.server is not None:
            self.server.chunks.peers = Peers(Members(peers, self.me), self.token)

    def config(self, digest: str, peers: str) -> MountConfig:
        names = {n: str(self.folder / n) for n in ("mountpoint", "log_file", "socket", "state_file", "home")}
        return MountConfig(
            manifest=digest, store_url=self.store_url, cache_dir=str(self.folder / "cache"), use_origin=False, cache_limit=0,
            peers=peers, peer_token=self.token, peer_self=self.me, fetch_threads=3, **names,
        )  # fmt: skip

    def load(self, digest: str, manifest, peers: str):
        return warm(self.config(digest, peers), manifest)

    def close(self) -> None:
        if self.server is not None:
            self.server.close()


def listed(*addresses: tuple[str, int]) -> str:
    """Return the value of --peers for these addresses."""
    return ",".join(f"{host}:{port}" for host, port in addresses)
