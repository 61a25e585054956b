"""Run a far store for benchmarks: an origin in its own network namespace, behind a link of a given rate and delay.

The rate is shaped by tc's tbf. The delay is the origin's, before every answer, where the kernel has no netem: nginx with
its echo module where that is installed (Debian: nginx and libnginx-mod-http-echo), else `lazyfs_origin.py`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

LIMIT_S = 300
_NGINX = """
load_module modules/ngx_http_echo_module.so;
daemon off; user root; pid {scratch}/nginx.pid; error_log stderr warn; worker_processes 2;
events {{ worker_connections 512; }}
http {{
    access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000; default_type application/octet-stream;
    client_body_temp_path {scratch}/body; proxy_temp_path {scratch}/proxy; fastcgi_temp_path {scratch}/fastcgi;
    uwsgi_temp_path {scratch}/uwsgi; scgi_temp_path {scratch}/scgi;
    server {{
        listen {host}:{port};
        location / {{ echo_sleep {delay_s}; echo_exec @files; }}
        location @files {{ root {folder}; autoindex on; }}
    }}
}}
"""


@contextlib.contextmanager
def far_origin(
    folder: Path, *, port: int = 8080, delay_s: float = 0.02, rate: str = "5gbit", server: str = "auto"
) -> Iterator[str]:
    """Serve `folder`; its URL. `server`: nginx, python, or auto (nginx where it works). Needs root and iproute2."""
    name, n = f"qt-bench-{os.getpid()}-{port}", port % 250
    host = f"198.18.{n}.2"
    commands = [
        f"ip netns add {name}",
        f"ip link add qb{port} type veth peer name eth0 netns {name}",
        f"ip addr add 198.18.{n}.1/24 dev qb{port}",
        f"ip link set qb{port} up",
        f"ip -n {name} addr add {host}/24 dev eth0",
        f"ip -n {name} link set eth0 up",
        f"ip -n {name} link set lo up",
        f"ip netns exec {name} tc qdisc add dev eth0 root tbf rate {rate} burst 8mb latency 100ms",
    ]
    process = None
    with tempfile.TemporaryDirectory(prefix="qt-origin-") as scratch:
        try:
            for command in commands:
                subprocess.run(command.split(), check=True, timeout=30)
            enter = ["ip", "netns", "exec", name]
            process = _start(enter, folder, host, port, delay_s, server, Path(scratch))
            yield f"http://{host}:{port}"
        finally:
            if process is not None:
                process.terminate()
                process.wait(30)
            subprocess.run(["ip", "link", "del", f"qb{port}"], check=False, timeout=30, capture_output=True)
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=30)


def origin_name(server: str = "auto") -> str:
    """Which origin `far_origin` would start."""
    if server != "auto":
        return server
    if shutil.which("nginx") is None:
        return "python"
    with tempfile.TemporaryDirectory(prefix="qt-origin-") as scratch:
        conf = _config(Path(scratch), Path(scratch), "127.0.0.1", 1, 0.0)
        done = subprocess.run(["nginx", "-t", "-q", "-c", str(conf)], capture_output=True, timeout=30, check=False)
    return "nginx" if done.returncode == 0 else "python"


def _config(scratch: Path, folder: Path, host: str, port: int, delay_s: float) -> Path:
    conf = scratch / "nginx.conf"
    conf.write_text(_NGINX.format(scratch=scratch, folder=folder, host=host, port=port, delay_s=delay_s))
    return conf


def _start(
    enter: list[str], folder: Path, host: str, port: int, delay_s: float, server: str, scratch: Path
) -> subprocess.Popen[str]:
    if origin_name(server) == "python":
        origin = Path(__file__).with_name("lazyfs_origin.py")
        command = [*enter, sys.executable, str(origin), str(folder), host, str(port), str(delay_s)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process
    conf = _config(scratch, folder, host, port, delay_s)
    process = subprocess.Popen([*enter, "nginx", "-c", str(conf)], text=True)
    deadline = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(f"http://{host}:{port}/", timeout=5):
                return process
        except OSError:
            if time.monotonic() > deadline or process.poll() is not None:
                process.kill()
                raise
            time.sleep(0.02)


DOWNLOAD = r"""
import http.client, sys, threading, time, mmap
host, *paths = sys.argv[1:]
lock, it, total = threading.Lock(), iter(paths), [0]
def go():
    c = http.client.HTTPConnection(host); buf = memoryview(mmap.mmap(-1, 1 << 20))
    while True:
        with lock: p = next(it, None)
        if p is None: return
        c.request("GET", p); r = c.getresponse(); n = 0
        assert r.status == 200, (p, r.status)
        while k := r.readinto(buf): n += k
        with lock: total[0] += n
t = time.perf_counter(); ts = [threading.Thread(target=go) for _ in range(16)]
[x.start() for x in ts]; [x.join() for x in ts]
print(total[0] / (time.perf_counter() - t) / 1e9)
"""


def download(url: str, store: Path) -> float:
    """GB/s of fetching every chunk of the store in `store` through `url` and throwing it away: what the link gives."""
    paths = ["/" + str(p.relative_to(store)) for p in (store / "chunks").rglob("*") if p.is_file()]
    done = subprocess.run(
        [sys.executable, "-c", DOWNLOAD, url.removeprefix("http://"), *paths],
        capture_output=True, text=True, timeout=LIMIT_S, check=True,
    )  # fmt: skip
    return float(done.stdout)
