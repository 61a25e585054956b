"""Measure how soon a large model begins to load on a new host, and how many bytes a launch writes for it.

    python benchmarks/first_start.py [--gigabytes 30] [--runs 3] [--json]

The model is shards of 4 GB: sparse files with a header of safetensors and a random head each. The engine is the tests' double, so only
quickthaw's own time is measured. Each run has a new state folder that contains only CRIU. Printed: seconds from the command until the
engine's process runs (the phase `loading`), and bytes that the launch wrote into its state folder by the time the engine serves.

Target: 30 GB begin to load in under 1 s, and no chunk is written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [str(ROOT), *[p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]]

from launchers.bare import free_port  # noqa: E402
from plugin.runtime.config import state_home  # noqa: E402
from plugin.runtime.signals import unwind  # noqa: E402
from tests.kits.launch_rig import environment, model  # noqa: E402

TARGET_S = 1.0
SHARD, HEAD = 4 << 30, 1 << 20


def large_model(folder: Path, gigabytes: int) -> Path:
    """Make a model of that size in the double's form, whose own weights are small."""
    model(folder)
    for number in range(-(-(gigabytes << 30) // SHARD)):
        header = json.dumps({"w": {"dtype": "U8", "shape": [SHARD - 72], "data_offsets": [0, SHARD - 72]}}).encode()
        with (folder / f"shard-{number:05}.bin").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header + os.urandom(HEAD))
            file.truncate(SHARD)
    return folder


def first_start(python: Path, folder: Path, home: Path) -> tuple[float, int]:
    """Return seconds until the engine loads, and bytes written into the state folder by the time it serves.

    Raises SystemExit if it ends before.
    """
    home.mkdir()
    (home / "criu").symlink_to(state_home() / "criu")
    env = {**os.environ, "QUICKTHAW_HOME": str(home), "PYTHONPATH": str(ROOT)}
    argv = [
        sys.executable,
        "-m",
        "plugin",
        "launch",
        "--engine-python",
        str(python),
        "sglang",
        "--model-path",
        str(folder),
    ]
    loading, written = -1.0, -1
    said = []
    began = time.monotonic()
    with subprocess.Popen(
        [*argv, "--host", "127.0.0.1", "--port", str(free_port())],
        cwd=ROOT,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                said.append(line)
                if line.startswith("quickthaw: loading"):
                    loading = time.monotonic() - began
                if re.match("quickthaw: (warming|trimming)", line):
                    written = sum(
                        file.stat().st_blocks * 512
                        for part in home.iterdir()
                        if part.name not in ("mounts", "criu")  # what the mount shows is the model itself
                        for file in part.rglob("*")
                        if file.is_file()
                    )
                    break
        finally:
            process.send_signal(signal.SIGTERM)
            process.stderr.read()
    if loading < 0 or written < 0:
        raise SystemExit("the engine did not come to serve:\n" + "".join(said[-15:]))
    return loading, written


def main() -> None:
    """Run the benchmark."""
    unwind()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=int, default=30)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        python = environment(place / "venv")
        large, small = large_model(place / "large", options.gigabytes), large_model(place / "small", 0)
        runs, others = [], []
        for number in range(options.runs):
            for folder, found in ((large, runs), (small, others)):
                home = place / f"home-{number}"
                found.append(first_start(python, folder, home))
                shutil.rmtree(home, ignore_errors=True)
    seconds, written = statistics.median(run[0] for run in runs), max(run[1] for run in runs)
    if options.json:
        found = {"loading_s": [run[0] for run in runs], "written_bytes": [run[1] for run in runs]}
        print(json.dumps(found | {"small_loading_s": [run[0] for run in others]}))
        return
    spread = f"{min(run[0] for run in runs):.2f} – {max(run[0] for run in runs):.2f}"
    print(
        f"{options.gigabytes} GB begin to load after {seconds:.2f} s ({spread}), {options.runs} runs; written: {written / 1e6:.2f} MB"
    )
    print(f"a model of 4 MB, in turn with it: {statistics.median(run[0] for run in others):.2f} s")
    print(f"target {TARGET_S} s: {'met' if seconds < TARGET_S else 'missed'}")


if __name__ == "__main__":
    main()
