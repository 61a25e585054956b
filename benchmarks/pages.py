"""Compare ways to restore a snapshot's pages, in turn on the same snapshot:

- plain: CRIU copies every page.
- filled: our page server puts every page in place with several threads while the processes are stopped.
- filled-one: the same for the largest process, and the others come by their working set, as where only that one has GPU state.
- filled-mapped: the same, with weights and libraries' data mapped (`--no-lazy`).
- criu-lazy: CRIU's own lazy-pages daemon.
- copied: our page server, everything copied.
- ours: our page server, with weights (whose areas the engine reported) and libraries' data mapped. Prints how much is mapped.

    python benchmarks/pages.py NAME [--runs 5] [--ways plain,filled] [--json]
    python benchmarks/pages.py NAME --criu-log          when CRIU does what, from its own log (which makes it slower)

For each way: seconds until CRIU returns, until the first token of a greedy generation, and of the second generation. The images
are in the page cache. Launcher, proxy and canary are not included: `quickthaw bench coldstart` measures with them. NAME: see
`quickthaw snapshot ls`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *[p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]]

import launchers  # noqa: E402
from checkpoint.criu.binary import Criu  # noqa: E402
from checkpoint.criu.pagemap import PAGE, process_ids, read_process  # noqa: E402
from checkpoint.sandbox.sandbox import CACHE_DIR, TMP_DIR, Bind, Sandbox, SandboxConfig  # noqa: E402
from checkpoint.snapshot import file_backed  # noqa: E402
from checkpoint.snapshot.library import Library  # noqa: E402
from checkpoint.snapshot.manifest import Snapshot  # noqa: E402
from checkpoint.snapshot.restore import LazyRestore, restore, unpack_cache  # noqa: E402
from launchers import control  # noqa: E402
from launchers.base import ENGINE_SITE  # noqa: E402
from launchers.client import Client  # noqa: E402
from launchers.engine_site import engine_site  # noqa: E402
from plugin.runtime.config import state_home  # noqa: E402
from plugin.runtime.signals import unwind  # noqa: E402
from plugin.runtime.steps.engine_output import Output  # noqa: E402
from plugin.runtime.steps.paging import map_pages  # noqa: E402

WAYS = ("plain", "filled", "filled-one", "filled-mapped", "criu-lazy", "copied", "ours")


def ask(sandbox: Sandbox, snapshot: Snapshot) -> tuple[float, float]:
    """Return the seconds of the first and of the second generation of one token."""
    client, engine = Client(lambda: sandbox.connect(snapshot.port)), launchers.engine(snapshot.engine)
    control.notify(sandbox.init_pid, control.WAKE)  # as the launcher does: no tile of AMX may be used before
    took = []
    for _ in range(2):
        began = time.monotonic()
        if (
            engine.generate(client, snapshot.canary.prompt, 1)
            != snapshot.canary.token_ids[-snapshot.canary.generated :][:1]
        ):
            raise SystemExit("the restored engine answers differently")
        took.append(time.monotonic() - began)
    return took[0], took[1]


def run(way: str, library: Library, criu: Criu, snapshot: Snapshot, record: bool = False) -> dict[str, float]:
    """Restore once; return the seconds, and the faults that our server served."""
    home = library.home
    cache = home / "compile" / snapshot.engine
    site = engine_site(home, ROOT / "plugin" / "engine")
    binds = [Bind(cache, Path(CACHE_DIR), read_only=False), Bind(site, Path(ENGINE_SITE))]
    outputs = {"stdout": Output(None), "stderr": Output(None)}
    pipes = {name: output.write_fd for name, output in outputs.items()}
    began = time.monotonic()
    if way == "criu-lazy":
        return _criu_lazy(library, criu, snapshot, binds, pipes, outputs)
    known = library.working_set(snapshot.name)
    lazy = None
    if way != "plain":
        mapped, fill = way in ("ours", "filled-mapped"), way.startswith("filled")
        lazy = LazyRestore(None if record else known, record, print, print, map_pages=mapped, fill=fill)
        if way == "filled-one":
            lazy = replace(lazy, fill_only=(_largest(library.path(snapshot.name) / "images"),))
    replica = restore(library, criu, snapshot, binds, cache, pipes, lazy=lazy)
    try:
        returned = time.monotonic() - began
        for output in outputs.values():
            output.close_write_end()
        first, second = ask(replica.sandbox, snapshot)
        found = {"criu_s": returned, "first_token_s": returned + first, "second_s": second}
        if "fill" in replica.spans:  # what CRIU does first, and what is left to fill after it
            found |= {"skeleton_s": replica.spans["criu"], "fill_s": replica.spans["fill"]}
        if criu.verbosity > 1:
            print_criu_log((replica.work / "restore.log").read_text(errors="replace"))
        if replica.pages:
            found["faults"] = replica.pages.stats()["faults"]
            replica.pages.first_token()
            if record:
                replica.pages.requests_done(save=known)
                replica.pages.wait_saved(20.0)
        return found
    finally:
        replica.close()


def _largest(images: Path) -> int:
    return max(process_ids(str(images)), key=lambda pid: read_process(str(images), pid).lazy_pages)


def _criu_lazy(
    library: Library,
    criu: Criu,
    snapshot: Snapshot,
    binds: list[Bind],
    pipes: dict[str, int],
    outputs: dict[str, Output],
) -> dict[str, float]:
    work = Path(tempfile.mkdtemp(prefix="quickthaw-pages-"))
    folder = library.path(snapshot.name)
    began = time.monotonic()
    argv = [
        str(criu.program),
        "lazy-pages",
        f"--images-dir={folder / 'images'}",
        f"--work-dir={work}",
        "--log-file=lazy.log",
    ]
    with subprocess.Popen(
        argv, env={**os.environ, "CRIU_CONFIG_FILE": "/dev/null"}, stderr=subprocess.DEVNULL
    ) as daemon:
        try:
            while not (work / "lazy-pages.socket").exists():
                if time.monotonic() - began > 10 or daemon.poll() is not None:
                    raise SystemExit(f"criu lazy-pages does not listen: {(work / 'lazy.log').read_text()[-500:]}")
                time.sleep(0.002)
            unpack_cache(folder, library.home / "compile" / snapshot.engine)
            with Sandbox(SandboxConfig(binds=binds, monotonic_ns=snapshot.monotonic_ns)) as sandbox:
                sandbox.unpack([(folder / "shm", "/dev/shm"), (folder / "tmp", TMP_DIR)])
                named = {snapshot.pipes[stream]: fd for stream, fd in pipes.items()}
                criu.restore(sandbox, snapshot.root_pid, folder / "images", 60.0, work, named, lazy_pages=True)
                returned = time.monotonic() - began
                for output in outputs.values():
                    output.close_write_end()
                first, second = ask(sandbox, snapshot)
            return {"criu_s": returned, "first_token_s": returned + first, "second_s": second}
        finally:
            daemon.kill()
            shutil.rmtree(work, ignore_errors=True)


def print_criu_log(text: str) -> None:
    """Print the seconds since CRIU's start, by process: its first line, last page read, restorer's first line, last line."""
    seen: dict[int, list[float]] = {}
    last = 0.0
    for line in text.splitlines():
        found = re.match(r"\((\d+\.\d+)\)\s*(pie: )?\s*(\d+): (.*)", line)
        if not found:
            continue
        last, restorer, pid, words = float(found[1]), bool(found[2]), int(found[3]), found[4]
        at = seen.setdefault(pid, [last, 0.0, 0.0, last])
        at[3] = last
        if words.startswith("Read piov"):
            at[1] = last
        if restorer and not at[2]:
            at[2] = last
    print(f"{'process':<10}{'begins':>10}{'pages read':>12}{'restorer':>10}{'done':>8}")
    for pid, (begins, read, restorer_s, done) in seen.items():
        if read:  # a process, not one of its threads
            print(f"{pid:<10}{begins:>9.3f}s{read:>11.3f}s{restorer_s:>9.3f}s{done:>7.3f}s")
    print(f"the last line of all: {last:.3f} s")


def mapped_bytes(folder: Path) -> dict[str, int]:
    """Return the bytes that the file-backed images map, and those that CRIU itself reads without and with them."""
    plain = folder / "images"
    mapped = file_backed.find(folder) or plain
    found = {"mapped_bytes": 0, "eager_bytes": 0, "eager_bytes_mapped": 0}
    for pid in process_ids(str(plain)):
        image = read_process(str(mapped), pid)
        found["mapped_bytes"] += sum(end - start for start, end, _ in image.mapped)
        found["eager_bytes"] += read_process(str(plain), pid).eager_pages * PAGE
        found["eager_bytes_mapped"] += image.eager_pages * PAGE
    return found


def main() -> None:
    """Measure and print."""
    unwind()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--ways", default=",".join(WAYS), help="those to compare, separated by commas")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--criu-log", action="store_true", help="print the times of one restore from CRIU's most verbose log"
    )
    options = parser.parse_args()
    library, criu = Library(state_home()), Criu.find(state_home())
    snapshot = library.load(options.name)
    if not library.working_set(snapshot.name).exists():
        run("ours", library, criu, snapshot, record=True)
    if options.criu_log:
        run("ours", library, replace(criu, verbosity=4), snapshot)
        return
    map_pages(library, snapshot)
    sizes = mapped_bytes(library.path(snapshot.name))
    ways = options.ways.split(",")
    if unknown := set(ways) - set(WAYS):
        parser.error(f"no such way: {', '.join(sorted(unknown))}")
    series: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for index in range(options.runs + 1):
        for way in ways:
            found = run(way, library, criu, snapshot)
            if index:  # the first round warms the page cache
                series[way].append(found)
    medians: dict[str, dict[str, Any]] = {
        way: {key: round(statistics.median(one[key] for one in runs), 3) for key in runs[0]}
        for way, runs in series.items()
    }
    if options.json:
        print(
            json.dumps(
                {
                    "snapshot": snapshot.name,
                    "image_bytes": snapshot.image_bytes,
                    "runs": options.runs,
                    **sizes,
                    **medians,
                },
                indent=1,
            )
        )
        return
    print(f"{snapshot.name}, images {snapshot.image_bytes / 1e9:.2f} GB, medians of {options.runs}")
    print(
        f"mapped {sizes['mapped_bytes'] / 1e6:.1f} MB; CRIU itself reads {sizes['eager_bytes_mapped'] / 1e6:.1f} MB of "
        f"{sizes['eager_bytes'] / 1e6:.1f} MB"
    )
    print(f"{'':<14}{'all restored':>14}{'first token':>14}{'second':>10}{'faults':>9}")
    for way, one in medians.items():
        print(
            f"{way:<14}{one['criu_s']:>12.3f} s{one['first_token_s']:>12.3f} s{one['second_s']:>8.3f} s{one.get('faults', '-'):>9}"
        )


if __name__ == "__main__":
    main()
