"""How long a launch takes to find out what this host can do (plugin/runtime/capabilities.py), the first time and remembered.

    python benchmarks/capabilities.py [RUNS]

Prints medians and spreads in milliseconds, each of a process and a state folder of its own; CRIU is this host's.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:] = [str(REPO), *[p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]]

from checkpoint.criu.binary import Criu  # noqa: E402
from plugin.runtime.home import state_home  # noqa: E402

ONE = """
import time
from pathlib import Path
from plugin.runtime.capabilities import detect
began = time.perf_counter()
host = detect(Path({home!r}))
took = time.perf_counter() - began
assert not host.capabilities.off(), host
print(1000 * took)
"""


def once(home: Path, environment: dict[str, str]) -> float:
    """Return the milliseconds of one detection in a new process, as each launch has it."""
    argv = [sys.executable, "-c", ONE.format(home=str(home))]
    done = subprocess.run(argv, cwd=REPO, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return float(done.stdout)


def main() -> None:
    """Alternate first and remembered detections."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    environment = {**os.environ, "QUICKTHAW_CRIU": str(Criu.find(state_home()).program)}
    took: dict[str, list[float]] = {"first": [], "remembered": []}
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            for values in took.values():
                values.append(once(Path(folder, "home"), environment))
    for kind, values in took.items():
        print(f"{kind:<10} {statistics.median(values):6.1f} ms ({min(values):.1f} – {max(values):.1f}), {runs} runs")


if __name__ == "__main__":
    main()
