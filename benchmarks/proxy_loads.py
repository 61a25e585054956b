"""The loads of `benchmarks/proxy.py`: clients that send, wait, read and disconnect, and their measurements."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 16}
REQUEST = json.dumps(BODY).encode()
TOKEN_EVERY_S = 0.02
KEY = "sk-benchmark-only-0123456789abcdef0123456789abcdef"  # LiteLLM does not start without one


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
    """Open loop at `rate` a second, the targets in turn, half a second each, so that the machine's changing speed affects them alike."""
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


def cpu_s(pid: int) -> float:
    """Processor time of a process and its children so far, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") + sum(cpu_s(int(child)) for child in children)


def throughput(port: int, pid: int, connections: int, seconds: float) -> dict[str, Any]:
    """Requests a second in a closed loop of `connections` clients, and the processor time that process `pid` took for each."""
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
        before = cpu_s(pid)
        text = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=60 + seconds).stdout
    rate, p99, errors = text.strip().rsplit("\n", 1)[-1].split()
    return {
        "connections": connections,
        "requests_per_s": float(rate),
        "p99_ms": float(p99),
        "errors": int(errors),
        "cpu_us": 1e6 * (cpu_s(pid) - before) / max(1.0, float(rate) * seconds),
    }


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


async def cancels(port: int, upstream_port: int, count: int) -> dict[str, Any]:
    """How long after a client went away in the middle of a stream the upstream's connection ended."""
    body = json.dumps(BODY | {"stream": True, "max_tokens": 100_000}).encode()
    await get(upstream_port, "/gone")  # what earlier parts left
    went: list[float] = []
    for _ in range(count):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head("/v1/chat/completions", len(body)) + body)
        while not (await reader.readline()).startswith(b"data: "):
            pass
        went.append(time.monotonic())
        writer.transport.abort()
        await asyncio.sleep(0.05)
    gone: list[float] = []
    end = time.monotonic() + 10
    while len(gone) < count and time.monotonic() < end:
        gone += json.loads(await get(upstream_port, "/gone"))
        await asyncio.sleep(0.1)
    took = sorted(b - a for a, b in zip(went, sorted(gone), strict=False))
    return {
        "streams": count,
        "cancelled": len(gone),
        "median_ms": 1000 * statistics.median(took) if took else float("inf"),
        "max_ms": 1000 * took[-1] if took else float("inf"),
    }


async def get(port: int, path: str) -> bytes:
    """One GET of the benchmark's own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    _, body = await read_whole(reader)
    writer.close()
    return body


async def without_upstream(port: int, model: str) -> int:
    """The status that a proxy answers at once when nothing listens behind it."""
    body = json.dumps(BODY | {"model": model}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head("/v1/chat/completions", len(body)) + body)
    async with asyncio.timeout(60):
        code, _ = await read_whole(reader)
    writer.close()
    return code


def memory_mb(pid: int, field: str = "VmRSS") -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"{field} of {pid}")


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
        while json.loads(await get(port, "/-/status"))["pools"][0]["held"] < count:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)
    holding = memory_mb(process.pid)
    began = time.perf_counter()
    process.send_signal(signal.SIGUSR1)
    async with asyncio.timeout(120):
        await asyncio.gather(*tasks)
    took = time.perf_counter() - began
    counted = json.loads(await get(upstream_port, "/count"))
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


async def big_body(port: int, pid: int | None, size: int) -> dict[str, Any]:
    """One body of `size` bytes; the memory is that of process `pid`, where it is one."""
    before = memory_mb(pid) if pid else 0.0
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
        "rss_peak_mb": memory_mb(pid, "VmHWM") if pid else 0.0,
    }


def imports() -> dict[str, float]:
    """Wall time in ms of a process that imports what each proxy needs, less a process that imports nothing."""

    def median(code: str) -> float:
        taken = []
        for _ in range(7):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    nothing = median("pass")
    needed = {
        "asyncio alone": "import asyncio",
        "quickthaw": "import uvloop, plugin.proxy.server, plugin.proxy.admin.endpoints, plugin.proxy.http.address",
        "quickthaw, ASGI": "import uvloop, uvicorn, plugin.proxy.asgi, plugin.proxy.http.address",
        "Starlette + aiohttp": "import sys, uvloop, uvicorn; sys.path.insert(0, 'benchmarks'); import proxy_peer",
    }
    if not all(find_spec(module) for module in ("uvicorn", "aiohttp")):
        needed = {name: code for name, code in needed.items() if "uvicorn" not in code}
    return {name: 1000 * (median(code) - nothing) for name, code in needed.items()}
