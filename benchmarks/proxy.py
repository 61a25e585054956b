"""What the proxy costs, side by side in one run: the bare upstream, this proxy, nginx and LiteLLM's proxy (those that
are installed).

    python benchmarks/proxy.py                       everything, about four minutes
    python benchmarks/proxy.py --quick               the same, shorter
    python benchmarks/proxy.py --only latency,held   some of: latency, throughput, streams, held, body, imports
    python benchmarks/proxy.py --litellm /path/to/venv/bin/litellm --json out.json

LiteLLM is not a dependency: install `litellm[proxy]` in an environment of its own and name its `litellm` script. A
peer that is absent is
said to be absent. `throughput` needs wrk (Debian's package). The upstream, the proxies and the load run on the same
cores, so
compare the columns of one run with each other, not with another machine's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 16}
REQUEST = json.dumps(BODY).encode()
TOKEN_EVERY_S = 0.02
KEY = "sk-benchmark-only-0123456789abcdef0123456789abcdef"  # LiteLLM does not start without one


# -- the upstream: as fast as Python allows, so that it is not what is measured ----------------------


async def upstream(port: int) -> None:
    import httptools

    answer = json.dumps(
        {
            "id": "c",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hello there"}}
            ],
            "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        }
    ).encode()
    whole = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(answer), answer)
    seen: dict[bytes, int] = {}
    loop = asyncio.get_running_loop()

    class Protocol(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport, self.parser = transport, httptools.HttpRequestParser(self)
            self.url, self.body, self.size = b"", b"", 0

        def data_received(self, data: bytes) -> None:
            self.parser.feed_data(data)

        def on_url(self, url: bytes) -> None:
            self.url = url

        def on_body(self, body: bytes) -> None:
            self.size += len(body)
            if self.size < 10_000:
                self.body += body

        def on_message_complete(self) -> None:
            if b'"stream":true' in self.body or b'"stream": true' in self.body:
                self.task = loop.create_task(self.stream())
            elif self.url.startswith(b"/count"):
                text = json.dumps({"requests": sum(seen.values()), "distinct": len(seen)}).encode()
                self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(text), text))
            elif self.url.startswith(b"/size"):
                text = b"%d" % self.size
                self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(text), text))
            else:
                if self.url.startswith(b"/held/"):
                    seen[self.url] = seen.get(self.url, 0) + 1
                self.transport.write(whole)
            self.body, self.size = b"", 0

        async def stream(self) -> None:
            self.transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            )
            for _ in range(int(os.environ["TOKENS"])):
                await asyncio.sleep(TOKEN_EVERY_S)
                delta = {"content": f"{time.monotonic():.6f} "}
                event = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
                event["choices"] = [{"index": 0, "delta": delta, "finish_reason": None}]  # type: ignore[assignment]
                data = b"data: " + json.dumps(event).encode() + b"\n\n"
                self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
            data = b"data: [DONE]\n\n"
            self.transport.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data))

    server = await loop.create_server(Protocol, "127.0.0.1", port, backlog=8192)
    await server.serve_forever()


async def ours(port: int, upstream_port: int, held: bool) -> None:
    from plugin.phases import Phase, PhaseTracker
    from plugin.proxy.pool import ReplicaPool
    from plugin.proxy.server import ProxyServer
    from plugin.proxy.settings import Settings
    from plugin.proxy.upstream import tcp

    sock = socket.create_server(("127.0.0.1", port), backlog=4096)
    pool = ReplicaPool()
    tracker = PhaseTracker(phase=Phase.IDLE if held else Phase.SERVING)
    pool.add("r0", tracker, tcp("127.0.0.1", upstream_port))
    server = ProxyServer(pool, Settings())
    await server.start(sock)

    def release() -> None:
        for phase in (Phase.MOUNTING, Phase.RESTORING, Phase.WAKING, Phase.VERIFYING, Phase.SERVING):
            tracker.to(phase)

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, release)
    await server.wait_stopped()


# -- starting and stopping ---------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def wait_port(port: int, process: subprocess.Popen[bytes], limit_s: float, path: str | None = None) -> None:
    import urllib.error
    import urllib.request

    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with code {process.returncode}")
        with contextlib.suppress(OSError, urllib.error.URLError):
            if path is None:
                socket.create_connection(("127.0.0.1", port), 1).close()
            else:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2).close()
            return
        time.sleep(0.05)
    raise TimeoutError(f"nothing listens on {port} after {limit_s:g} s")


@contextmanager
def running(
    arguments: list[str], port: int, *, limit_s: float = 20, path: str | None = None, **env: str
) -> Iterator[subprocess.Popen[bytes]]:
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log, env=os.environ | env, start_new_session=True)
        try:
            try:
                wait_port(port, process, limit_s, path)
            except (RuntimeError, TimeoutError) as exc:
                log.seek(0)
                raise RuntimeError(f"{exc}: {log.read()[-500:].decode('utf-8', 'replace')}") from exc
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def me(*arguments: str) -> list[str]:
    return [sys.executable, __file__, *arguments]


@contextmanager
def nginx(upstream_port: int) -> Iterator[int]:
    binary = shutil.which("nginx") or "/usr/sbin/nginx"
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "nginx.conf")
        config.write_text(f"""
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 8192; }}
http {{
  access_log off; keepalive_requests 100000000; client_max_body_size 0; client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream engine {{ server 127.0.0.1:{upstream_port}; keepalive 256; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
      proxy_request_buffering off; proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
    }}
  }}
}}
""")
        with running([binary, "-p", folder, "-c", str(config)], port):
            yield port


@contextmanager
def litellm(script: str, upstream_port: int) -> Iterator[int]:
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.yaml")
        config.write_text(
            "model_list:\n- model_name: m\n  litellm_params:\n    model: openai/m\n"
            f"    api_base: http://127.0.0.1:{upstream_port}/v1\n    api_key: k\n"
            "litellm_settings: {telemetry: false}\n"
        )
        arguments = [script, "--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
        quiet = {
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_LOG": "ERROR",
            "LITELLM_TELEMETRY": "False",
            "LITELLM_MASTER_KEY": KEY,
        }
        with running(arguments, port, limit_s=90, path="/health/liveliness", **quiet):
            yield port


# -- loads -------------------------------------------------------------------------------------------


def head(path: str, length: int) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


async def read_whole(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    raw = (await reader.readuntil(b"\r\n\r\n")).lower()
    status = int(raw.split(b" ", 2)[1])
    if b"content-length: " in raw:
        return status, await reader.readexactly(int(raw.split(b"content-length: ")[1].split(b"\r\n")[0]))
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readuntil(b"\r\n")
    return status, body


class Client:
    """A few kept connections to one target, for a steady rate of requests."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.taken: list[float] = []
        self.failed = 0

    async def one(self, due: float) -> None:
        try:
            reader, writer = self.idle.pop() if self.idle else await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(head("/v1/chat/completions", len(REQUEST)) + REQUEST)
            status, _ = await read_whole(reader)
            self.idle.append((reader, writer))
            self.failed += status != 200
        except (OSError, asyncio.IncompleteReadError):
            self.failed += 1
        self.taken.append(time.perf_counter() - due)


async def latency(ports: dict[str, int], rate: float, seconds: float) -> dict[str, Any]:
    """Open loop at `rate` a second, the targets in turn, half a second each, so that they share the machine's moods."""
    clients = {name: Client(port) for name, port in ports.items()}
    slice_s = 0.5
    for turn in range(-1, int(seconds / slice_s)):
        for client in clients.values():
            began = time.perf_counter()
            tasks = []
            for n in range(int(rate * slice_s)):
                due = began + n / rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                tasks.append(asyncio.create_task(client.one(time.perf_counter())))
            await asyncio.gather(*tasks)
            if turn < 0:  # the first turn only opens connections
                client.taken.clear()
    out = {}
    for name, client in clients.items():
        taken = sorted(client.taken)
        out[name] = {
            "n": len(taken),
            "failed": client.failed,
            "median_ms": 1000 * statistics.median(taken),
            "p99_ms": 1000 * taken[int(0.99 * len(taken))],
        }
    return out


def throughput(port: int, connections: int, seconds: float) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(
            'wrk.method="POST"; wrk.headers["Content-Type"]="application/json"; '
            f'wrk.headers["Authorization"]="Bearer {KEY}"\n'
            f"wrk.body='{REQUEST.decode()}'\n"
            'done=function(s,l,r) io.write(string.format("%f %f %d\\n", s.requests/(s.duration/1e6), l:percentile(99)/1e3,'
            " s.errors.status+s.errors.read+s.errors.connect+s.errors.timeout)) end\n"
        )
        script.flush()
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        arguments = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}", "-s", script.name, url]
        text = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=60 + seconds).stdout
    rate, p99, errors = text.strip().rsplit("\n", 1)[-1].split()
    return {"connections": connections, "requests_per_s": float(rate), "p99_ms": float(p99), "errors": int(errors)}


async def streams(port: int, count: int, tokens: int) -> dict[str, Any]:
    """How late each event is: from the upstream's clock at the write to this one's at the read (one machine, one
    clock).
    """
    late: list[float] = []
    body = json.dumps(BODY | {"stream": True, "max_tokens": tokens}).encode()

    async def one(n: int) -> int:
        await asyncio.sleep(n * TOKEN_EVERY_S / count)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head("/v1/chat/completions", len(body)) + body)
        got = 0
        while line := await reader.readline():
            if line.startswith(b"data: [DONE]"):
                break
            if line.startswith(b"data: "):
                now = time.monotonic()
                content = json.loads(line[6:])["choices"][0].get("delta", {}).get("content")
                if content:
                    late.append(now - float(content))
                    got += 1
        writer.close()
        return got

    async with asyncio.timeout(60 + tokens * TOKEN_EVERY_S * 20):
        counts = await asyncio.gather(*(one(n) for n in range(count)))
    late.sort()
    return {
        "streams": count,
        "events": len(late),
        "complete": all(c == tokens for c in counts),
        "median_ms": 1000 * statistics.median(late),
        "p99_ms": 1000 * late[int(0.99 * len(late))],
        "max_ms": 1000 * late[-1],
    }


def memory_mb(pid: int, field: str = "VmRSS") -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"{field} of {pid}")


async def status(port: int) -> dict[str, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /-/status HTTP/1.1\r\nHost: t\r\n\r\n")
    _, body = await read_whole(reader)
    writer.close()
    document: dict[str, Any] = json.loads(body)
    return document


async def held(port: int, upstream_port: int, process: subprocess.Popen[bytes], count: int) -> dict[str, Any]:
    before = memory_mb(process.pid)
    answered: list[int] = []

    async def one(n: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head(f"/held/{n}", len(REQUEST)) + REQUEST)
        code, _ = await read_whole(reader)
        answered.append(code)
        writer.close()

    tasks = [asyncio.create_task(one(n)) for n in range(count)]
    async with asyncio.timeout(60):
        while (await status(port))["pools"][0]["held"] < count:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)
    holding = memory_mb(process.pid)
    began = time.perf_counter()
    process.send_signal(signal.SIGUSR1)
    async with asyncio.timeout(120):
        await asyncio.gather(*tasks)
    took = time.perf_counter() - began
    reader, writer = await asyncio.open_connection("127.0.0.1", upstream_port)
    writer.write(b"GET /count HTTP/1.1\r\nHost: t\r\n\r\n")
    counted = json.loads((await read_whole(reader))[1])
    writer.close()
    return {
        "held": count,
        "answered_200": answered.count(200),
        "upstream_requests": counted["requests"],
        "upstream_distinct": counted["distinct"],
        "rss_before_mb": before,
        "rss_holding_mb": holding,
        "rss_peak_mb": memory_mb(process.pid, "VmHWM"),
        "released_in_s": took,
    }


async def big_body(port: int, pid: int, size: int) -> dict[str, Any]:
    before = memory_mb(pid)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began = time.perf_counter()
    writer.write(head("/size", size))
    block = bytes(1 << 20)
    for _ in range(size >> 20):
        writer.write(block)
        await writer.drain()
    _, body = await read_whole(reader)
    took = time.perf_counter() - began
    writer.close()
    return {
        "bytes": size,
        "arrived": int(body) == size,
        "gb_per_s": size / took / 1e9,
        "rss_before_mb": before,
        "rss_peak_mb": memory_mb(pid, "VmHWM"),
    }


def imports() -> dict[str, Any]:
    """Wall time of a process that imports all that the restore path needs, less a process that imports nothing."""

    def median(code: str) -> float:
        taken = []
        for _ in range(7):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    needed = "import uvloop, plugin.proxy.server, plugin.proxy.own, plugin.proxy.upstream"
    return {
        "import_ms": 1000 * (median(needed) - median("pass")),
        "of_which_asyncio_ms": 1000 * (median("import asyncio") - median("pass")),
    }


def peer(script: str, up: int, parts: list[str], quick: bool, tokens: int) -> dict[str, Any]:
    """LiteLLM by itself, so that its load does not colour the others, and at a rate that it can follow."""
    out: dict[str, Any] = {}
    with litellm(script, up) as port:
        if "latency" in parts:
            rate = 20
            got = out["latency"] = asyncio.run(latency({"bare": up, "litellm": port}, rate, 4 if quick else 10))
            rows = [[f"{rate} requests a second", "median ms", "p99 ms", "failed"]]
            rows += [[n, f"{r['median_ms']:.2f}", f"{r['p99_ms']:.2f}", str(r["failed"])] for n, r in got.items()]
            table("LiteLLM, latency, open loop, small JSON", rows)
        if "throughput" in parts:
            series = out["throughput"] = [throughput(port, c, 2 if quick else 5) for c in (1, 16)]
            cells = [f"{r['requests_per_s']:,.0f} ({r['p99_ms']:.1f})" + ("!" if r["errors"] else "") for r in series]
            table(
                "LiteLLM, throughput", [["requests a second (p99 ms)", "1 clients", "16 clients"], ["litellm", *cells]]
            )
        if "streams" in parts:
            r = out["streams"] = asyncio.run(streams(port, 8, tokens // 3))
            figures = [f"{r[k]:.2f}" for k in ("median_ms", "p99_ms", "max_ms")]
            table(
                "LiteLLM, 8 streams", [["an event every 20 ms", "median ms", "p99 ms", "max ms"], ["litellm", *figures]]
            )
    return out


# -- the run -----------------------------------------------------------------------------------------


def table(title: str, rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print(f"\n{title}")
    for row in rows:
        print(
            "  "
            + "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )


def verdict(name: str, value: float, limit: float, unit: str, *, least: bool = False) -> bool:
    ok = value >= limit if least else value <= limit
    print(
        f"  {'met    ' if ok else 'NOT MET'}  {name}: {value:,.2f} {unit} ({'at least' if least else 'at most'} {limit:,g})"
    )
    return ok


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="latency,throughput,streams,held,body,imports")
    parser.add_argument("--litellm", default=os.environ.get("LITELLM") or shutil.which("litellm"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    parts = options.only.split(",")
    quick = options.quick
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536) if hard > 0 else 65536, hard))
    results: dict[str, Any] = {"cpus": os.cpu_count(), "absent": []}
    met: list[bool] = []
    tokens = 100 if quick else 300
    up = free_port()
    with contextlib.ExitStack() as stack:
        stack.enter_context(running(me("_upstream", str(up)), up, TOKENS=str(tokens)))
        our_port = free_port()
        process = stack.enter_context(running(me("_ours", str(our_port), str(up)), our_port))
        ports = {"bare": up, "quickthaw": our_port}
        if shutil.which("nginx") or Path("/usr/sbin/nginx").exists():
            ports["nginx"] = stack.enter_context(nginx(up))
        else:
            results["absent"].append("nginx")
        if not options.litellm:
            results["absent"].append("litellm")
        for name in results["absent"]:
            print(f"{name} is not installed: not measured")
        if "latency" in parts:
            got = results["latency"] = asyncio.run(latency(ports, 200, 4 if quick else 15))
            bare = got["bare"]
            rows = [["200 requests a second", "median ms", "p99 ms", "added median", "added p99", "failed"]]
            for name, r in got.items():
                added = [f"{r[k] - bare[k]:+.2f}" for k in ("median_ms", "p99_ms")]
                rows.append([name, f"{r['median_ms']:.2f}", f"{r['p99_ms']:.2f}", *added, str(r["failed"])])
            table("Latency, open loop, small JSON", rows)
            ours_ = got["quickthaw"]
            met.append(verdict("added median", ours_["median_ms"] - bare["median_ms"], 0.7, "ms"))
            met.append(verdict("added p99", ours_["p99_ms"] - bare["p99_ms"], 4.0, "ms"))
        if "throughput" in parts and not shutil.which("wrk"):
            print("\nwrk is not installed: throughput not measured")
            results["absent"].append("wrk")
        elif "throughput" in parts:
            levels = (1, 16, 64, 256)
            got = results["throughput"] = {
                name: [throughput(port, c, 2 if quick else 5) for c in levels] for name, port in ports.items()
            }
            rows = [["requests a second (p99 ms), one worker", *(f"{c} clients" for c in levels)]]
            for name, series in got.items():
                rows.append(
                    [
                        name,
                        *(
                            f"{r['requests_per_s']:,.0f} ({r['p99_ms']:.1f})" + ("!" if r["errors"] else "")
                            for r in series
                        ),
                    ]
                )
            table("Throughput, closed loop, small JSON ('!': some failed)", rows)
            met.append(
                verdict(
                    "throughput", max(r["requests_per_s"] for r in got["quickthaw"]), 1800, "requests/s", least=True
                )
            )
        if "streams" in parts:
            got = results["streams"] = {name: asyncio.run(streams(port, 64, tokens)) for name, port in ports.items()}
            rows = [["64 streams, an event every 20 ms", "median ms", "p99 ms", "max ms", "events", "complete"]]
            for name, r in got.items():
                figures = [f"{r[k]:.2f}" for k in ("median_ms", "p99_ms", "max_ms")]
                rows.append([name, *figures, f"{r['events']:,}", "yes" if r["complete"] else "no"])
            table("Streams: how late an event is", rows)
            met.append(verdict("p99 later than bare", got["quickthaw"]["p99_ms"] - got["bare"]["p99_ms"], 5.0, "ms"))
        if "body" in parts:
            r = results["body"] = asyncio.run(big_body(our_port, process.pid, (256 << 20) if quick else (1 << 30)))
            figures = [
                f"{r['gb_per_s']:.2f}",
                f"{r['rss_before_mb']:.0f}",
                f"{r['rss_peak_mb']:.0f}",
                str(r["arrived"]),
            ]
            table(
                "A large body",
                [[f"{r['bytes'] >> 20} MiB", "GB/s", "MB before", "MB peak", "whole"], ["quickthaw", *figures]],
            )
            met.append(verdict("memory it took", r["rss_peak_mb"] - r["rss_before_mb"], 32, "MB"))
        if "held" in parts:
            port = free_port()
            process = stack.enter_context(running(me("_ours", str(port), str(up), "held"), port))
            r = results["held"] = asyncio.run(held(port, up, process, 2000))
            rows = [
                [
                    "2,000 held, then released",
                    "200s",
                    "seen once each",
                    "MB before",
                    "MB holding",
                    "MB peak",
                    "released in s",
                ]
            ]
            once = r["upstream_requests"] == r["upstream_distinct"] == 2000
            memory = [f"{r[k]:.0f}" for k in ("rss_before_mb", "rss_holding_mb", "rss_peak_mb")]
            rows.append(
                ["quickthaw", f"{r['answered_200']:,}", "yes" if once else "NO", *memory, f"{r['released_in_s']:.2f}"]
            )
            table("Held requests (nginx and LiteLLM do not hold: they answer 502 or 500 at once)", rows)
            met.append(verdict("memory with 2,000 held and released", r["rss_peak_mb"], 150, "MB"))
            met.append(verdict("answered, each once", r["answered_200"] if once else 0, 2000, "requests", least=True))
        if options.litellm and {"latency", "throughput", "streams"} & set(parts):
            results["litellm"] = peer(options.litellm, up, parts, quick, tokens)
        if "imports" in parts:
            r = results["imports"] = imports()
            print(
                f"\nImports on the restore path: {r['import_ms']:.0f} ms, of which asyncio itself {r['of_which_asyncio_ms']:.0f} ms"
            )
            met.append(verdict("imports", r["import_ms"], 150, "ms"))
    results["met"] = all(met)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    sys.exit(0 if all(met) else 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["_upstream"]:
        import uvloop

        uvloop.run(upstream(int(sys.argv[2])))
    elif sys.argv[1:2] == ["_ours"]:
        import uvloop

        uvloop.run(ours(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:5] == ["held"]))
    else:
        main()
