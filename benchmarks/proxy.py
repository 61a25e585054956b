"""Measure the proxy's overhead, side by side in one run: the bare upstream, the proxy's own port, the same proxy as an ASGI
application under uvicorn, a simple proxy in Starlette and aiohttp (`proxy_peer`), nginx and LiteLLM's proxy.

    python benchmarks/proxy.py                       everything, about six minutes
    python benchmarks/proxy.py --quick               the same, shorter
    python benchmarks/proxy.py --only latency,held   some of: latency, throughput, streams, cancel, held, body, imports
    python benchmarks/proxy.py --against DIR         and the port of another checkout in DIR, as `before`
    python benchmarks/proxy.py --litellm /path/to/venv/bin/litellm --json out.json

LiteLLM is not a dependency: install `litellm[proxy]` in an environment of its own and name its `litellm` script. A missing peer
is reported and skipped. `throughput` needs wrk (Debian's package). The upstream, the proxies and the
load run on the same cores, so compare the columns of one run with each other, not with another machine's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from proxy_loads import (
    KEY,
    big_body,
    cancels,
    held,
    imports,
    latency,
    streams,
    throughput,
    without_upstream,
)
from proxy_servers import SERVERS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from plugin.bench.client import free_port  # noqa: E402
from plugin.proxy.descriptor_limit import raise_files  # noqa: E402
from plugin.runtime.signals import unwind  # noqa: E402

# -- starting and stopping ---------------------------------------------------------------------------


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


PIDS: dict[int, int] = {}
"""The process that serves each port."""


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
            PIDS[port] = process.pid
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
            "model_list:\n"
            + "".join(
                f"- model_name: {name}\n  litellm_params:\n    model: openai/m\n"
                f"    api_base: http://127.0.0.1:{at}/v1\n    api_key: k\n"
                for name, at in (("m", upstream_port), ("down", free_port()))
            )
            + "litellm_settings: {telemetry: false, num_retries: 0}\n"
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


Ports = dict[str, int]


def latency_part(ports: Ports, peer: Ports, quick: bool) -> tuple[dict[str, Any], list[bool]]:
    """At the rate of the target, and once more with the peer at one that it can follow."""
    results, met = {}, []
    rows = [["open loop, small JSON", "a second", "median ms", "p99 ms", "added median", "added p99", "failed"]]
    for rate, targets in ((200, ports), (20, ports | peer)):
        if rate == 20 and not peer:
            continue
        got = results[str(rate)] = asyncio.run(latency(targets, rate, 4 if quick else 15))
        bare = got["bare"]
        for name, r in got.items():
            added = [f"{r[k] - bare[k]:+.2f}" for k in ("median_ms", "p99_ms")]
            rows.append([name, str(rate), f"{r['median_ms']:.2f}", f"{r['p99_ms']:.2f}", *added, str(r["failed"])])
    table("Latency", rows)
    bare, ours_ = results["200"]["bare"], results["200"]["quickthaw"]
    met.append(verdict("added median", ours_["median_ms"] - bare["median_ms"], 0.7, "ms"))
    met.append(verdict("added p99", ours_["p99_ms"] - bare["p99_ms"], 4.0, "ms"))
    met.append(verdict("failed", ours_["failed"], 0, "requests"))
    return results, met


def throughput_part(ports: Ports, peer: Ports, quick: bool) -> tuple[dict[str, Any], list[bool]]:
    """Closed loop at rising concurrency."""
    levels = (1, 16, 64, 256)
    seconds = 2 if quick else 4
    got = {n: [throughput(p, PIDS[p], c, seconds) for c in levels] for n, p in (ports | peer).items()}
    rows = [["requests a second (p99 ms), one worker", *(f"{c} clients" for c in levels)]]
    for name, series in got.items():
        cells = [f"{r['requests_per_s']:,.0f} ({r['p99_ms']:.1f})" + ("!" if r["errors"] else "") for r in series]
        rows.append([name, *cells])
    table("Throughput, closed loop, small JSON ('!': some failed)", rows)
    rows = [["processor time for a request, microseconds", *(f"{c} clients" for c in levels)]]
    rows += [[name, *(f"{r['cpu_us']:.0f}" for r in series)] for name, series in got.items()]
    table("Processor time of the proxy alone, which a busy machine changes least", rows)
    met = [
        verdict("throughput", max(r["requests_per_s"] for r in got["quickthaw"]), 1800, "requests/s", least=True),
        verdict("failed", sum(r["errors"] for r in got["quickthaw"]), 0, "requests"),
    ]
    return got, met


def streams_part(ports: Ports, peer: Ports, quick: bool) -> tuple[dict[str, Any], list[bool]]:
    """64 at once; the peer gets shorter ones, since it does not keep up."""
    tokens = 100 if quick else 300
    got = {name: asyncio.run(streams(port, 64, tokens)) for name, port in ports.items()}
    got |= {name: asyncio.run(streams(port, 64, tokens // 6)) for name, port in peer.items()}
    rows = [["64 streams, an event every 20 ms", "median ms", "p99 ms", "max ms", "events", "complete"]]
    for name, r in got.items():
        figures = [f"{r[k]:.2f}" for k in ("median_ms", "p99_ms", "max_ms")]
        rows.append([name, *figures, f"{r['events']:,}", "yes" if r["complete"] else "no"])
    table("Streams: how late an event is", rows)
    late = got["quickthaw"]["p99_ms"] - got["bare"]["p99_ms"]
    met = [verdict("p99 later than bare", late, 5.0, "ms")]
    met.append(verdict("streams that came whole", 64 if got["quickthaw"]["complete"] else 0, 64, "streams", least=True))
    return got, met


def cancel_part(ports: Ports, peer: Ports, upstream_port: int, quick: bool) -> tuple[dict[str, Any], list[bool]]:
    """A client goes in the middle of a stream."""
    count = 10 if quick else 40
    got = {n: asyncio.run(cancels(port, upstream_port, count)) for n, port in (ports | peer).items()}
    rows = [["a client goes: the upstream's request ends after", "median ms", "max ms", "of"]]
    rows += [
        [n, f"{r['median_ms']:.2f}", f"{r['max_ms']:.2f}", f"{r['cancelled']}/{r['streams']}"] for n, r in got.items()
    ]
    table("Cancelling", rows)
    r = got["quickthaw"]
    met = [verdict("cancelled within", r["max_ms"], 100.0, "ms")]
    met.append(verdict("cancelled", r["cancelled"], r["streams"], "streams", least=True))
    return got, met


def body_part(ports: Ports, pid: int, quick: bool) -> tuple[dict[str, Any], list[bool]]:
    """One large body."""
    size = (256 << 20) if quick else (1 << 30)
    got = {n: asyncio.run(big_body(p, pid if n == "quickthaw" else None, size)) for n, p in ports.items()}
    rows = [[f"{size >> 20} MiB", "GB/s", "MB before", "MB peak", "whole"]]
    for name, r in got.items():
        memory = [f"{r[k]:.0f}" if r[k] else "" for k in ("rss_before_mb", "rss_peak_mb")]
        rows.append([name, f"{r['gb_per_s']:.2f}", *memory, "yes" if r["arrived"] else "NO"])
    table("A large body", rows)
    r = got["quickthaw"]
    met = [verdict("memory it took", r["rss_peak_mb"] - r["rss_before_mb"], 32, "MB")]
    met.append(verdict("bodies that came whole", int(r["arrived"]), 1, "bodies", least=True))
    return got, met


def held_part(up: int, ports: Ports, peer: Ports) -> tuple[dict[str, Any], list[bool]]:
    """2,000 requests while no replica serves; what the others say when nothing listens behind them."""
    got: dict[str, dict[str, Any]] = {}
    for name, face in (("quickthaw", "_ours"), ("quickthaw, ASGI", "_asgi")):
        if name in ports:
            port, own_up = free_port(), free_port()  # an upstream of its own counts this face's requests only
            arguments = me(face, str(port), str(own_up), "held")
            with running(me("_upstream", str(own_up)), own_up), running(arguments, port) as process:
                got[name] = asyncio.run(held(port, own_up, process, 2000))
    names = (
        "2,000 held, then released",
        "200s",
        "each seen once",
        "MB before",
        "MB holding",
        "MB peak",
        "released in s",
    )
    rows = [list(names)]
    for name, r in got.items():
        once = r["upstream_requests"] == r["upstream_distinct"] == 2000
        memory = [f"{r[k]:.0f}" for k in ("rss_before_mb", "rss_holding_mb", "rss_peak_mb")]
        rows.append([name, f"{r['answered_200']:,}", "yes" if once else "NO", *memory, f"{r['released_in_s']:.2f}"])
    others: dict[str, int] = {}
    if "nginx" in ports:
        with nginx(free_port()) as lone:
            others["nginx"] = asyncio.run(without_upstream(lone, "m"))
    if "Starlette + aiohttp" in ports:
        lone = free_port()
        with running(me("_starlette", str(lone), str(free_port())), lone):
            others["Starlette + aiohttp"] = asyncio.run(without_upstream(lone, "m"))
    others |= {name: asyncio.run(without_upstream(p, "down")) for name, p in peer.items()}
    rows += [[name, f"answers {status} at once", "", "", "", "", ""] for name, status in others.items()]
    table("Held requests", rows)
    r = got["quickthaw"]
    once = r["upstream_requests"] == r["upstream_distinct"] == 2000
    met = [verdict("memory with 2,000 held and released", r["rss_peak_mb"], 150, "MB")]
    met.append(verdict("answered, each once", r["answered_200"] if once else 0, 2000, "requests", least=True))
    return r | {"others": others}, met


def main() -> None:
    unwind()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="latency,throughput,streams,cancel,held,body,imports")
    parser.add_argument("--litellm", default=os.environ.get("LITELLM") or shutil.which("litellm"))
    parser.add_argument("--against", type=Path, help="another checkout, whose port is measured too, as `before`")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    parts, quick = options.only.split(","), options.quick
    raise_files()
    results: dict[str, Any] = {"cpus": os.cpu_count(), "absent": []}
    met: list[bool] = []
    up = free_port()
    with contextlib.ExitStack() as stack:
        stack.enter_context(running(me("_upstream", str(up)), up))
        our_port = free_port()
        process = stack.enter_context(running(me("_ours", str(our_port), str(up)), our_port))
        ports, peer = {"bare": up, "quickthaw": our_port}, Ports()
        if options.against:
            old = [sys.executable, str(options.against / "benchmarks" / "proxy.py"), "_ours"]
            port = ports["before"] = free_port()
            stack.enter_context(running([*old, str(port), str(up)], port))
        for name, kind, needs in (
            ("quickthaw, ASGI", "_asgi", ("uvicorn",)),
            ("Starlette + aiohttp", "_starlette", ("uvicorn", "aiohttp")),
        ):
            if missing := [module for module in needs if find_spec(module) is None]:
                results["absent"] += missing
            else:
                port = ports[name] = free_port()
                stack.enter_context(running(me(kind, str(port), str(up)), port))
        if shutil.which("nginx") or Path("/usr/sbin/nginx").exists():
            ports["nginx"] = stack.enter_context(nginx(up))
        else:
            results["absent"].append("nginx")
        if options.litellm and {"latency", "throughput", "streams", "cancel", "held"} & set(parts):
            peer["litellm"] = stack.enter_context(litellm(options.litellm, up))
        elif not options.litellm:
            results["absent"].append("litellm")
        if "throughput" in parts and not shutil.which("wrk"):
            parts.remove("throughput")
            results["absent"].append("wrk")
        for name in results["absent"]:
            print(f"{name} is not installed: not measured")
        runs = {
            "latency": lambda: latency_part(ports, peer, quick),
            "throughput": lambda: throughput_part(ports, peer, quick),
            "streams": lambda: streams_part(ports, peer, quick),
            "cancel": lambda: cancel_part(ports, peer, up, quick),
            "body": lambda: body_part(ports, process.pid, quick),
            "held": lambda: held_part(up, ports, peer),
        }
        for name, run in runs.items():
            if name in parts:
                results[name], verdicts = run()
                met += verdicts
        if "imports" in parts:
            results["imports"] = r = imports()
            rows = [["imports before the port answers", "ms"], *([name, f"{ms:.0f}"] for name, ms in r.items())]
            table("Imports", rows)
            met.append(verdict("imports", r["quickthaw"], 150, "ms"))
    results["met"] = all(met)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    sys.exit(0 if all(met) else 1)


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in SERVERS:
        SERVERS[sys.argv[1]](*sys.argv[2:])
    else:
        main()
