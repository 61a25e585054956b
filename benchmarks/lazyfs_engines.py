"""Compare a bare engine's cold starts from a plain directory, a complete local mount, and a far store with an access log.

    python benchmarks/lazyfs_engines.py sglang --rounds 3
    python benchmarks/lazyfs_engines.py vllm --rounds 2 --rate 1gbit --wrap "flock /run/alone.lock"

No sandbox, no proxy, no snapshot: `python -m sglang.launch_server …` as its user would type it, on another path. The clock
runs from before the mount (if there is one) to the first token. The kinds alternate after one warm-up of each, in
another order each round; a round runs under one `--wrap`, so compared starts are at most minutes apart. The results
are medians, and the median of the rounds' own ratios. `cpu_s` is what all processors of the machine computed from the
clock's start to the first token, the mount's daemon included: on a quiet machine it varies less than the time does. The
mount's cache holds the whole model for `local` (and the file it was imported from is not used);
it is empty for `remote`, whose store is 20 ms and `--rate` away and contains an access log. Compare `remote` with a
download followed by a start, minus the download: that is the plain start. The loading phase is what the engine logs of it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(ROOT), *[p for p in sys.path if Path(p or ".").resolve() != HERE], str(HERE)]

from lazyfs_link import far_origin  # noqa: E402

from lazyfs.api import MountHandle, import_directory, mount  # noqa: E402
from plugin.bench import client as measure  # noqa: E402
from plugin.bench.presets import preset  # noqa: E402
from plugin.runtime.config import state_home  # noqa: E402
from plugin.runtime.signals import unwind  # noqa: E402

KINDS = ("plain", "local", "remote")
MODULES = {"vllm": "vllm.entrypoints.openai.api_server", "sglang": "sglang.launch_server"}
LOADING = re.compile(r"(?:Loading weights took|Load weight end\.[^\n]*?elapsed=) ?([0-9.]+)")
LIMIT_S = 600.0


# With the engines in it; the mount's own things go to another, which is put into the environment later.
USER_HOME = state_home()


def processor_seconds() -> float:
    """Return the processor time of the whole machine since its boot, in seconds of one processor."""
    used = psutil.cpu_times()
    return float(used.user + used.nice + used.system + used.irq + used.softirq)


def start_once(engine: str, kind: str, scratch: Path, digest: str, url: str) -> dict[str, float]:
    """One start to its first token: seconds in all, of the mount, and of the loading phase as the engine logs it."""
    found = preset(engine, USER_HOME)
    port, log = measure.free_port(), scratch / f"{kind}.log"
    environment = {**os.environ, **found.environment, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    # Where the mount keeps its own things; the engine's caches stay where they are.
    os.environ["QUICKTHAW_HOME"] = str(scratch / "home")
    cache = scratch / ("local-cache" if kind == "local" else "remote-cache")
    if kind == "remote":
        shutil.rmtree(cache, ignore_errors=True)
    shared = set(Path("/dev/shm").glob("sglang_loads_*"))
    began, used = time.monotonic(), processor_seconds()
    handle: MountHandle | None = None
    try:
        model = found.model
        if kind != "plain":
            handle = mount(digest, scratch / "mnt" / found.model.name, store_url=url, cache_dir=cache, use_origin=False)
            model = handle.mountpoint
        mounted = time.monotonic() - began
        arguments = [str(model) if a == str(found.model) else a for a in found.arguments]
        argv = [str(found.python), "-m", MODULES[engine], *arguments, "--host", "127.0.0.1", "--port", str(port)]
        command = measure.Command(argv, environment, log, scratch)
        process = command.start()
        try:
            measure.waiting_client(port, str(model), began, LIMIT_S, process)
            total, computed = time.monotonic() - began, processor_seconds() - used
        finally:
            command.stop()
        loading = [float(x) for x in LOADING.findall(log.read_text(errors="replace"))]
        return {
            "first_token_s": total,
            "cpu_s": computed,
            "mount_s": mounted,
            "loading_s": max(loading, default=float("nan")),
        }
    except measure.MeasureError as error:
        raise SystemExit(f"{kind}: {error}\n{log.read_text(errors='replace')[-3000:]}") from error
    finally:
        if handle is not None:
            handle.unmount(force=True)
        # SGLang leaves one behind for each start that is ended by a signal.
        for left in set(Path("/dev/shm").glob("sglang_loads_*")) - shared:
            left.unlink(missing_ok=True)


def prepare(engine: str, scratch: Path) -> str:
    """Import the model, fill the local cache, and record a trace by reading in the order of the file."""
    os.environ["QUICKTHAW_HOME"] = str(scratch / "home")
    model = preset(engine, USER_HOME).model
    store = str(scratch / "store")
    digest = import_directory(model, store)
    settings = {"store_url": store, "cache_dir": scratch / "local-cache", "use_origin": False}
    handle = mount(digest, scratch / "mnt" / model.name, **settings)
    try:
        reader = "import sys; from pathlib import Path\nfor p in sorted(Path(sys.argv[1]).rglob('*')): p.read_bytes()"
        subprocess.run([sys.executable, "-c", reader, str(handle.mountpoint)], check=True, timeout=LIMIT_S)
        limit = time.monotonic() + LIMIT_S
        while (status := handle.status())["cached_bytes"] < status["bytes"]:
            if time.monotonic() > limit:
                raise SystemExit(f"the local cache did not fill: {status['cached_bytes']} of {status['bytes']} bytes")
            time.sleep(0.1)
    finally:
        handle.unmount(force=True)
    return digest


def main() -> None:
    unwind()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=sorted(MODULES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--rate", default="5gbit", help="of the link to the far store")
    parser.add_argument(
        "--wrap", default="", help="a command before each round, such as a lock that keeps others quiet"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--once", nargs=4, metavar=("KINDS", "SCRATCH", "DIGEST", "URL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        order, scratch, digest, url = arguments.once
        for kind in order.split(","):
            where = url if kind == "remote" else str(Path(scratch) / "store")
            one = start_once(arguments.engine, kind, Path(scratch), digest, where)
            print("RESULT " + json.dumps([kind, one]), flush=True)
        return
    kinds = arguments.kinds.split(",")
    if set(kinds) - set(KINDS):
        parser.error(f"--kinds: {', '.join(KINDS)}")
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="qt-engines-") as folder:
        scratch = Path(folder)
        (scratch / "mnt").mkdir()
        digest = prepare(arguments.engine, scratch)
        environment = {**os.environ, "QUICKTHAW_HOME": str(USER_HOME)}
        with far_origin(scratch / "store", rate=arguments.rate, port=8190) as url:
            for number in range(arguments.rounds + 1):
                shift = number % len(kinds)
                order = ",".join(kinds[shift:] + kinds[:shift])
                command = [sys.executable, str(Path(__file__).resolve()), arguments.engine]
                command += ["--once", order, folder, digest, url]
                done = subprocess.run(
                    [*shlex.split(arguments.wrap), *command],
                    env=environment, capture_output=True, text=True, timeout=7200, check=False,
                )  # fmt: skip
                lines = [x.removeprefix("RESULT ") for x in done.stdout.splitlines() if x.startswith("RESULT ")]
                if len(lines) != len(kinds):
                    raise SystemExit(f"{order}: {len(lines)} results\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
                label = f"round {number}" if number else "warm-up"
                for kind, one in map(json.loads, lines):
                    if number:
                        found[kind].append(one)
                    print(f"{label:8} {kind:7} " + "  ".join(f"{k} {v:.3f}" for k, v in one.items()), flush=True)
    medians = {k: {name: statistics.median(r[name] for r in rows) for name in rows[0]} for k, rows in found.items()}
    for kind in kinds:
        line = "  ".join(f"{name} {value:.3f}" for name, value in medians[kind].items())
        if "plain" in medians:
            for name in ("first_token_s", "cpu_s"):
                pairs = [one[name] / plain[name] for one, plain in zip(found[kind], found["plain"], strict=True)]
                line += f"  {name} of plain {medians[kind][name] / medians['plain'][name]:.4f}"
                line += f" (by rounds {statistics.median(pairs):.4f}, {min(pairs):.3f} to {max(pairs):.3f})"
        print(f"median   {kind:7} {line}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"engine": arguments.engine, "runs": found, "medians": medians}, indent=1))


if __name__ == "__main__":
    main()
