"""A hub on loopback: the part of the Hugging Face hub's HTTP interface that huggingface_hub uses to download models.

`Hub` serves folders as repositories. The tests count its requests and inject failures. The client is the real one.
"""

import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = 10 << 10
"""Files of this size or more are announced as the hub announces files of its large-file storage."""


class Repository:
    """The files of a folder as one commit, and the names that refer to it."""

    def __init__(self, folder, token=None, gated=False):
        self.folder, self.token, self.gated = Path(folder), token, gated
        self.commits, self.refs = {}, {}
        self.commit("main")

    def commit(self, ref="main"):
        """Commit the folder as it is now, and let `ref` point to it."""
        files = {str(f.relative_to(self.folder)): f.read_bytes() for f in self.folder.rglob("*") if f.is_file()}
        sha = hashlib.sha1(
            repr(sorted((n, hashlib.sha1(d).hexdigest()) for n, d in files.items())).encode()
        ).hexdigest()
        self.commits[sha], self.refs[ref] = files, sha
        return sha


class Hub:
    """A running hub. `requests` holds the (method, path) of each request."""

    def __init__(self):
        self.repositories, self.requests = {}, []
        self.cut_after = None
        """Bytes after which the connection of each download of a large file is cut; None for whole files."""
        self.hold = None
        """An event for which each download of a large file waits after its first bytes."""
        self.redirects = False
        """Whether large files are redirected to another address, as the hub does; `signed` counts how often."""
        self.signed = 0
        self.expired = set()
        """Signatures that the other address refuses."""
        self.refuses_ranges = False
        """Whether the other address refuses a request of a part of a file."""
        self.wrong = None
        """A function of (name, data) that returns the bytes to send in place of a large file's."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home, **more):
        """Return the variables of a client of this hub with a cache of its own."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **more}

    def add(self, name, folder, **more):
        self.repositories[name] = Repository(folder, **more)
        return self.repositories[name]

    def downloads(self):
        """Return the names of the files whose content was requested."""
        return [
            path.split("/resolve/")[1].split("/", 1)[1]
            for method, path in self.requests
            if method == "GET" and "/resolve/" in path
        ]

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self._answer()

        def do_GET(self):
            self._answer()

        def _answer(self):
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            api = re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/([^/]+)(?:/.*)?)?", path)
            file = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
            if signed := re.fullmatch(r"/signed/(\d+)/(.+?)/([0-9a-f]{40})/(.+)", path):
                if int(signed[1]) in hub.expired:
                    return self._json({"error": "expired"}, 403)
                if hub.refuses_ranges and self.headers.get("Range"):
                    return self._json({"error": "no ranges"}, 416 if hub.refuses_ranges == 416 else 400)
                return self._file(signed[3], hub.repositories[signed[2]].commits[signed[3]][signed[4]], signed[4])
            match = api or file
            repository = hub.repositories.get(match[1]) if match else None
            if repository is None:
                return self._refuse(401, "RepoNotFound", "Invalid username or password.")
            given = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if repository.token and given != repository.token:
                if repository.gated:
                    return self._refuse(403 if given else 401, "GatedRepo", "Access to this model is restricted.")
                return self._refuse(401, "RepoNotFound", "Invalid username or password.")
            revision = (api[3] if api else file[2]) or "main"
            sha = repository.refs.get(revision, revision)
            if sha not in repository.commits:
                return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            files = repository.commits[sha]
            if api and api[2] == "tree":
                return self._json([_entry(name, data) for name, data in sorted(files.items())])
            if api:
                siblings = [{"rfilename": name} for name in sorted(files)]
                return self._json(
                    {
                        "id": match[1],
                        "modelId": match[1],
                        "sha": sha,
                        "siblings": siblings,
                        "tags": [],
                        "private": False,
                    }
                )
            if file[3] not in files:
                return self._refuse(404, "EntryNotFound", "Entry not found")
            data = files[file[3]]
            if hub.redirects and len(data) >= LARGE:
                hub.signed += 1
                self.send_response(302)
                for name, value in (
                    ("Location", f"/signed/{hub.signed}/{match[1]}/{sha}/{file[3]}"),
                    ("ETag", _etag(data)),
                    ("X-Linked-Size", str(len(data))),
                    ("X-Linked-ETag", _etag(data)),
                    ("X-Repo-Commit", sha),
                    ("Content-Length", "0"),
                ):
                    self.send_header(name, value)
                return self.end_headers()
            return self._file(sha, data, file[3])

        def _file(self, sha, data, name):
            large = len(data) >= LARGE
            if large and hub.wrong is not None:
                data = hub.wrong(name, data)
            start = 0
            if ranged := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start = int(ranged[1])
                end = int(ranged[2]) + 1 if ranged[2] else len(data)
                data, total = data[start:end], len(data)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{total}")
                full = None
            else:
                self.send_response(200)
                full = data
            etag = _etag(full) if full is not None else '"ranged"'
            self.send_header("ETag", etag)
            if large and full is not None:
                self.send_header("X-Linked-Size", str(len(data)))
                self.send_header("X-Linked-ETag", etag)
            self.send_header("X-Repo-Commit", sha)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if large and hub.hold is not None:
                self.wfile.write(data[:LARGE])
                self.wfile.flush()
                hub.hold.wait(60)
                data = data[LARGE:]
            if large and hub.cut_after is not None:
                self.wfile.write(data[: hub.cut_after])
                self.wfile.flush()
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(2)
                return
            with contextlib.suppress(OSError):
                self.wfile.write(data)

        def _json(self, body, status=200, headers=()):
            data = json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _refuse(self, status, code, message):
            self._json({"error": message}, status, (("X-Error-Code", code), ("X-Error-Message", message)))

    return Handler


def _etag(data):
    if len(data) >= LARGE:
        return f'"{hashlib.sha256(data).hexdigest()}"'
    return f'"{_blob(data)}"'


def _blob(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(name, data):
    found = {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}
    if len(data) >= LARGE:
        found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return found
