"""An OCI registry on loopback: blobs with ranges, uploads, manifests, and, if asked for, a token service."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Registry:
    """A running registry. `requests`: (method, path) of each. `password`: user:password that pushing and pulling need, by a token."""

    def __init__(self, password: str = "") -> None:
        self.password, self.token = password, "sesame"
        # The token service that challenges name; this registry's own if empty.
        self.token_service = ""
        # Where a GET of a blob is redirected to.
        self.blobs_at = ""
        # Uploads that are refused as if their token had expired, and passwords that were seen.
        self.expire_uploads = 0
        self.passwords = 0
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[tuple[str, str], bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def count(self, method: str, word: str) -> int:
        return sum(1 for one, path in self.requests if one == method and word in path)


def _handler(registry: Registry) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self._answer()

        def do_GET(self):
            self._answer()

        def do_POST(self):
            self._answer()

        def do_PUT(self):
            self._answer()

        def _answer(self):
            path = self.path.partition("?")[0]
            registry.requests.append((self.command, path))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            registry.passwords += self.headers.get("Authorization", "").startswith("Basic ")
            if path == "/token":
                right = base64.b64encode(registry.password.encode()).decode()
                good = self.headers.get("Authorization") == f"Basic {right}"
                return self._send(200 if good else 401, json.dumps({"token": registry.token}).encode() if good else b"")
            if registry.password and self.headers.get("Authorization") != f"Bearer {registry.token}":
                realm = registry.token_service or f"http://{registry.host}/token"
                challenge = f'Bearer realm="{realm}",service="registry",scope="repository:x:pull,push"'
                return self._send(401, b"", {"WWW-Authenticate": challenge})
            match = re.fullmatch(r"/v2/(.+?)/(manifests|blobs)/(.+)", path)
            if match is None:
                return self._send(404, b"")
            repository, kind, name = match.groups()
            if kind == "blobs" and self.command == "GET" and registry.blobs_at:
                return self._send(307, b"", {"Location": registry.blobs_at})
            if name == "uploads/":
                return self._send(202, b"", {"Location": f"/v2/{repository}/blobs/uploads/1?state=x"})
            if self.command == "PUT" and kind == "blobs" and registry.expire_uploads:
                registry.expire_uploads -= 1
                registry.token = "another"
                return self._send(401, b"", {"WWW-Authenticate": f'Bearer realm="http://{registry.host}/token"'})
            if self.command == "PUT":
                return self._put(repository, kind, name, body)
            data = registry.manifests.get((repository, name)) if kind == "manifests" else registry.blobs.get(name)
            if data is None:
                return self._send(404, b"")
            ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if ranged and kind == "blobs":
                start, end = int(ranged[1]), int(ranged[2]) + 1 if ranged[2] else len(data)
                part = data[start:end]
                where = {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(data)}"}
                return self._send(206, part, where)
            return self._send(200, data, {"Docker-Content-Digest": _digest(data)})

        def _put(self, repository, kind, name, body):
            if kind == "manifests":
                for layer in json.loads(body)["layers"]:
                    assert layer["digest"] in registry.blobs
                registry.manifests[repository, name] = registry.manifests[repository, _digest(body)] = body
                return self._send(201, b"")
            expected = re.search(r"digest=([^&]+)", self.path)[1].replace("%3A", ":")
            if _digest(body) != expected:
                return self._send(400, b"")
            registry.blobs[expected] = body
            return self._send(201, b"")

        def _send(self, status, data, headers=None):
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    return Handler


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
