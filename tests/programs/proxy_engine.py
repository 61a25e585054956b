"""A small engine that a command wakes: `proxy_engine.py PORT [NAME]`. Standard library only, for a fast start."""

import http.server
import json
import os
import sys
import time

paths: list[str] = []  # counts all requests


class Engine(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        paths.append(self.path)
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length)
        name = sys.argv[2] if len(sys.argv) > 2 else ""
        answer = {"pid": os.getpid(), "name": name, "path": self.path, "length": length, "paths": paths}
        if self.headers.get("x-echo"):
            answer["body"] = body.decode()
        body = json.dumps(answer).encode()
        refused = self.path.startswith("/refuse/")
        time.sleep(0.3 * (refused or self.path.startswith("/slow/")))
        self.send_response(401 if refused else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Engine).serve_forever()
