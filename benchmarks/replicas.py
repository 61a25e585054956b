"""Compare N replicas of one snapshot restored at the same moment with one, and measure the cost of verifying digests.

    python benchmarks/replicas.py NAME [N] [--runs 3] [--json]

Each run is `quickthaw restore NAME --replicas N` from its first instruction to the moment at which a replica serves, which is when its
first tokens (the canary's, recorded at the dump) have been generated and compared. NAME: see `quickthaw snapshot ls`. On few
processors the number of concurrent restores is limited; QUICKTHAW_RESTORE_CONCURRENCY=N sets another limit.

Target: the last of N in under 2.5 times the time of one, *per core available*: with C cores and N > C replicas, N / C replicas share a
core, so the measured ratio is divided by N / C. Both are printed. A first run that is not counted warms the page cache and, with a
request, records the working set.

Verification: one replica with `--verify never`, `auto` (what changed since the last check on this host: nothing, here) and `always` (every
byte), in turn. Target: `auto` costs less than 15 % of the restore without.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *[p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]]

from checkpoint.snapshot.library import Library  # noqa: E402
from plugin.bench.client import service_port, stream_completion  # noqa: E402
from plugin.runtime.config import state_home  # noqa: E402
from plugin.runtime.signals import unwind  # noqa: E402

TARGET, TARGET_VERIFY = 2.5, 0.15
LIMIT_S = 300.0
VERIFY = ("never", "auto", "always")


def restore(name: str, replicas: int, verify: str = "auto", ask: bool = False) -> list[float]:
    """Seconds from the command's start until each replica serves, in order; the command is stopped then, with `ask` after one answer."""
    port = service_port()
    argv = [sys.executable, "-m", "plugin.restore", name, "--replicas", str(replicas), "--verify", verify]
    argv += ["--host", "127.0.0.1", "--port", str(port)]
    env = {n: v for n, v in os.environ.items() if n != "PYTHONDONTWRITEBYTECODE"}
    began = time.monotonic()
    served: list[float] = []
    with subprocess.Popen(
        argv, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = []
        try:
            for line in process.stderr:
                said.append(line)
                if re.match(r"quickthaw: (replica \d+: )?serving ", line):
                    served.append(time.monotonic() - began)
                    if len(served) == replicas:
                        break
                if "failed" in line or time.monotonic() - began > LIMIT_S:
                    break
            if ask and len(served) == replicas:
                stream_completion(port, Library(state_home()).load(name).model, began, 8, LIMIT_S)
        finally:
            process.send_signal(signal.SIGTERM)
            process.stderr.read()
            process.wait(60)
    if len(served) < replicas:
        raise SystemExit(f"only {len(served)} of {replicas} served:\n" + "".join(said[-15:]))
    return served


def measure(name: str, replicas: int, runs: int) -> dict[str, Any]:
    """Medians of `runs`, the kinds in turn; seconds."""
    restore(name, 1, ask=True)  # a working set is kept only once an answer has been given
    time.sleep(1.0)
    series: dict[str, list[float]] = {"one": [], "first": [], "last": [], **{f"verify_{how}": [] for how in VERIFY}}
    for _ in range(runs):
        series["one"].append(restore(name, 1)[0])
        many = restore(name, replicas)
        series["first"].append(many[0])
        series["last"].append(many[-1])
        for how in VERIFY:
            series[f"verify_{how}"].append(restore(name, 1, how)[0])
    median = {key: statistics.median(values) for key, values in series.items()}
    cores = len(os.sched_getaffinity(0))
    ratio = median["last"] / median["one"]
    return {
        "snapshot": name,
        "replicas": replicas,
        "cores": cores,
        "runs": runs,
        "median_s": {key: round(value, 3) for key, value in median.items()},
        "all_s": {key: [round(v, 3) for v in values] for key, values in series.items()},
        "ratio": round(ratio, 2),
        "ratio_per_core": round(ratio / max(1.0, replicas / cores), 2),
        "verify_auto_share": round(median["verify_auto"] / median["verify_never"] - 1, 3),
        "verify_always_share": round(median["verify_always"] / median["verify_never"] - 1, 3),
    }


def show(found: dict[str, Any]) -> None:
    median, spread = found["median_s"], found["all_s"]
    image = Library(state_home()).load(found["snapshot"]).image_bytes

    def row(what: str, key: str, note: str = "") -> None:
        values = spread[key]
        print(f"  {what:<34}{median[key]:>8.3f} s   ({min(values):.3f} to {max(values):.3f})  {note}".rstrip())

    n, cores = found["replicas"], found["cores"]
    print(
        f"{found['snapshot']}, images {image / 1e9:.2f} GB, {cores} cores, medians of {found['runs']}; command to first token"
    )
    row("one replica", "one")
    row(f"first of {n} at once", "first")
    row(f"last of {n} at once", "last", f"{found['ratio']:.2f} times one")
    print(
        f"  per core available ({n} replicas on {cores} cores): {found['ratio_per_core']:.2f} times one; "
        f"target under {TARGET}: {'met' if found['ratio_per_core'] < TARGET else 'missed'}"
    )
    row("digests: none", "verify_never")
    row("digests: of what changed (default)", "verify_auto", f"{found['verify_auto_share']:+.1%}")
    row("digests: every byte", "verify_always", f"{found['verify_always_share']:+.1%}")
    met = found["verify_auto_share"] < TARGET_VERIFY
    print(f"  target for the default under {TARGET_VERIFY:.0%}: {'met' if met else 'missed'}")


def main() -> None:
    """Run and print."""
    unwind()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("replicas", type=int, nargs="?", default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.name, options.replicas, options.runs)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)


if __name__ == "__main__":
    main()
