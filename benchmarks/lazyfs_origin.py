"""An HTTP origin for benchmarks: files of a folder, ranges, sendfile, and a fixed delay before every answer.

    python benchmarks/lazyfs_origin.py FOLDER HOST PORT DELAY-SECONDS

The delay stands for the round trip of a far store where the kernel has no netem; the rate is shaped outside, by tc.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote


def serve_one(client: socket.socket, root: Path, delay: float) -> None:
    """Answer the requests of one kept connection."""
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    lines = client.makefile("rb")
    while True:
        request = lines.readline()
        if not request:
            return
        method, path, _ = request.decode("latin-1").split(" ")
        headers = {}
        while (line := lines.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        time.sleep(delay)
        target = root / unquote(path).lstrip("/")
        if target.is_dir():
            names = "".join(f'<a href="{n.name}{"/" * n.is_dir()}">{n.name}</a>\n' for n in sorted(target.iterdir()))
            body = f"<html><body>\n{names}</body></html>".encode()
            head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            client.sendall(head + (b"" if method == "HEAD" else body))
            continue
        try:
            fd = os.open(target, os.O_RDONLY)
        except OSError:
            client.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            continue
        try:
            st = os.fstat(fd)
            start, end, status = 0, st.st_size - 1, "200 OK"
            extra = ""
            if "range" in headers:
                first, _, last = headers["range"].removeprefix("bytes=").partition("-")
                start, end = int(first), min(int(last), end) if last else end
                status, extra = "206 Partial Content", f"Content-Range: bytes {start}-{end}/{st.st_size}\r\n"
            modified = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(st.st_mtime))
            client.sendall(
                f"HTTP/1.1 {status}\r\nContent-Length: {end - start + 1}\r\nAccept-Ranges: bytes\r\n{extra}"
                f'ETag: "{st.st_mtime_ns:x}-{st.st_size:x}"\r\nLast-Modified: {modified}\r\n'
                "Content-Type: application/octet-stream\r\n\r\n".encode()
            )
            while method != "HEAD" and start <= end:
                start += os.sendfile(client.fileno(), fd, start, end - start + 1)
        finally:
            os.close(fd)


def main() -> None:
    root, host, port, delay = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    server = socket.create_server((host, port), backlog=128)
    print("ready", flush=True)

    def guarded(client: socket.socket) -> None:
        try:
            serve_one(client, root, delay)
        except (ConnectionError, ValueError):
            pass
        finally:
            client.close()

    while True:
        client, _ = server.accept()
        threading.Thread(target=guarded, args=(client,), daemon=True).start()


if __name__ == "__main__":
    main()
