"""Compare restoring from a store with downloading first, on a new host behind a link of 1 Gbit/s and 20 ms.

    python benchmarks/remote.py NAME [--runs 3] [--rate 1gbit] [--delay-ms 20] [--ways remote download] [--json]

NAME is a snapshot of this host with a recorded working set (its first restore records it; see `quickthaw snapshot ls`). It is pushed to a
new store, which an HTTP origin in a network namespace serves. The rate is tc's (tbf on the origin's interface); the delay is the
origin's, before every answer, because many kernels lack netem. So connections begin at full speed, unlike on a real link.
Times run from the command to the first token of a request that is already waiting. Each run has a fresh home; the engine's own files
(interpreter, libraries) are in the page cache, the snapshot is not.

`working set`: the compressed objects of the archive's `first.bytes` up to the first token; their time on the link is
measured in the same run by fetching only these objects with 16 connections and discarding them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *[p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]]

from benchmarks.lazyfs import far_origin  # noqa: E402
from checkpoint.snapshot.library import Library  # noqa: E402
from checkpoint.snapshot.manifest import Snapshot  # noqa: E402
from checkpoint.store.archive import LEVEL_REMOTE, OpenedArchive, open_chunks, push  # noqa: E402
from checkpoint.store.layout import BYTES  # noqa: E402
from lazyfs.content.chunk_store import chunk_key, zero_digest  # noqa: E402
from plugin.bench.client import Command, free_port, waiting_client  # noqa: E402
from plugin.runtime.config import state_home  # noqa: E402
from plugin.runtime.signals import unwind  # noqa: E402

PORT = 8080
LIMIT_S = 120.0
WAYS = ("download", "remote")

FETCH = r"""
import http.client, sys, threading, time
host, *paths = sys.argv[1:]
lock, it, total = threading.Lock(), iter(paths), [0]
def go():
    c = http.client.HTTPConnection(host); buf = bytearray(4 << 20)
    while True:
        with lock: p = next(it, None)
        if p is None: return
        c.request("GET", p); r = c.getresponse(); n = 0
        while k := r.readinto(buf): n += k
        with lock: total[0] += n
t = time.perf_counter(); ts = [threading.Thread(target=go) for _ in range(16)]
[x.start() for x in ts]; [x.join() for x in ts]
print(total[0], time.perf_counter() - t)
"""


def working_set_keys(url: str, name: str) -> list[str]:
    """The objects of the store that hold what a restore needs before its first token."""
    opened = OpenedArchive.of(name, open_chunks(url))
    if opened.layout is None:
        raise SystemExit(f"{name} has no recorded working set; restore it once (quickthaw restore {name})")
    file = next(file for file in opened.archive.files if file.path == BYTES)
    keys = []
    for chunk, offset in zip(file.chunks, file.offsets, strict=False):
        if offset < opened.layout.first and chunk.digest != zero_digest(chunk.length):
            keys.append(chunk_key(chunk.digest, chunk.encoding))
    return list(dict.fromkeys(keys))


def on_link(url: str, keys: list[str]) -> tuple[int, float]:
    """Bytes of these objects and seconds to fetch them and throw them away."""
    done = subprocess.run(
        [sys.executable, "-c", FETCH, url.removeprefix("http://"), *("/" + key for key in keys)],
        capture_output=True, text=True, timeout=LIMIT_S, check=True,
    )  # fmt: skip
    size, seconds = done.stdout.split()
    return int(size), float(seconds)


def fresh_home(scratch: Path) -> Path:
    """A home with CRIU in it and nothing else."""
    home = scratch / "home"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(mode=0o700)
    (home / "criu").symlink_to((state_home() / "criu").resolve())
    return home


def received() -> int:
    """Bytes that came over the link so far, all of them."""
    return int(Path(f"/sys/class/net/qb{PORT}/statistics/rx_bytes").read_text())


def run(way: str, url: str, snapshot: Snapshot, scratch: Path, rest_s: float) -> dict[str, float]:
    """One start on a host with nothing; seconds and bytes."""
    home = fresh_home(scratch)
    environment = {**os.environ, "QUICKTHAW_HOME": str(home), "PYTHONPATH": str(ROOT)}
    port = free_port()
    before = received()
    began = time.monotonic()
    python = [sys.executable, "-m"]
    found: dict[str, float] = {}
    where: list[str] = ["--snapshot-store", url]
    if way == "download":
        pulled = [*python, "plugin", "snapshot", "pull", snapshot.name, url]
        subprocess.run(pulled, env=environment, cwd=ROOT, check=True, timeout=LIMIT_S, stdout=subprocess.DEVNULL)
        found["downloaded_s"] = time.monotonic() - began
        where = []
    argv = [*python, "plugin.restore", snapshot.name, "--port", str(port), *where]
    command = Command(argv, environment, scratch / f"{way}.log", ROOT)
    process = command.start()
    try:
        answer = waiting_client(port, snapshot.model, began, LIMIT_S, process)
        found["bytes"] = float(received() - before)
        found["first_token_s"] = answer.first_s
        later = []
        for _ in range(4):
            asked = time.monotonic()
            later.append(waiting_client(port, snapshot.model, asked, LIMIT_S, process, tokens=1).first_s)
        found["second_to_fifth_s"] = statistics.median(later)
        limit = time.monotonic() + rest_s
        while way == "remote" and not Library(home).has(snapshot.name) and time.monotonic() < limit:
            time.sleep(0.1)
        if Library(home).has(snapshot.name):
            found["complete_s"] = time.monotonic() - began
    finally:
        command.stop()
    return found


def main() -> None:
    """Run and print."""
    unwind()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--delay-ms", type=float, default=20.0)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--level", type=int, default=LEVEL_REMOTE, help="zstd level of the pushed archive")
    parser.add_argument(
        "--rest-s", type=float, default=60.0, help="how long to wait for the rest after the first token"
    )
    parser.add_argument("--store", type=Path, help="a store to push into and to keep  [default: a temporary one]")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    library = Library(state_home())
    snapshot = library.load(options.name)
    with tempfile.TemporaryDirectory(prefix="qt-remote-", dir=options.scratch) as scratch_name:
        scratch = Path(scratch_name)
        store = options.store or scratch / "store"
        with library.in_use(snapshot.name) as folder:
            push(folder, open_chunks(f"file://{store}", options.level))
        stored = sum(file.stat().st_size for file in (store / "chunks").rglob("*") if file.is_file())
        keys = working_set_keys(f"file://{store}", snapshot.name)
        series: dict[str, list[dict[str, float]]] = {way: [] for way in options.ways}
        links = []
        with far_origin(store, port=PORT, delay_s=options.delay_ms / 1000, rate=options.rate) as url:
            for _ in range(options.runs):
                links.append(on_link(url, keys))
                for way in options.ways:
                    series[way].append(run(way, url, snapshot, scratch, options.rest_s))
    link_s = statistics.median(seconds for _, seconds in links)
    size = links[0][0]
    medians: dict[str, dict[str, Any]] = {
        way: {key: round(statistics.median(one[key] for one in runs if key in one), 3) for key in runs[-1]}
        for way, runs in series.items()
    }
    found = {
        "snapshot": snapshot.name, "image_bytes": snapshot.image_bytes, "stored_bytes": stored, "runs": options.runs,
        "rate": options.rate, "delay_ms": options.delay_ms, "working_set_bytes": size, "working_set_on_link_s": round(link_s, 3),
        **medians,
    }  # fmt: skip
    if "remote" in medians:
        found["remote_over_working_set"] = round(medians["remote"]["first_token_s"] / link_s, 3)
    if len(medians) == 2:
        found["remote_over_download"] = round(
            medians["remote"]["first_token_s"] / medians["download"]["first_token_s"], 3
        )
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(
        f"{snapshot.name}: images {snapshot.image_bytes / 1e9:.2f} GB, {stored / 1e6:.0f} MB in the store; link {options.rate}, "
        f"{options.delay_ms:g} ms; medians of {options.runs}"
    )
    print(
        f"working set: {size / 1e6:.1f} MB compressed, {link_s:.2f} s on this link ({size / link_s * 8 / 1e9:.2f} Gbit/s)"
    )
    print(f"{'':<10}{'first token':>14}{'MB by then':>12}{'2nd to 5th':>12}{'complete':>11}")
    for way, one in medians.items():
        complete = f"{one['complete_s']:.1f} s" if "complete_s" in one else "-"
        print(
            f"{way:<10}{one['first_token_s']:>12.2f} s{one['bytes'] / 1e6:>12.1f}{one['second_to_fifth_s']:>10.3f} s{complete:>11}"
        )
    for key, text in (
        ("remote_over_working_set", "first token / working set on the link"),
        ("remote_over_download", "remote / download"),
    ):
        if key in found:
            print(f"{text}: {found[key]:.2f}")


if __name__ == "__main__":
    main()
