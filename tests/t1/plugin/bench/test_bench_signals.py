"""A benchmark that a signal ends leaves nothing: no engine, no snapshot, no logs."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from plugin.bench.client import Command
from tests.kits.launch_rig import REPO, Rig
from tests.kits.leftovers import processes

pytestmark = [pytest.mark.t1, pytest.mark.slow]


@pytest.mark.parametrize(
    ("kind", "number"), [("alone", signal.SIGTERM), ("alone", signal.SIGHUP), ("restored", signal.SIGTERM)]
)
def test_a_signal_ends_the_engine_that_is_measured(tmp_path, double, kind, number):
    rig, temporary = Rig(tmp_path, double, "vllm"), tmp_path / "tmp"
    temporary.mkdir()
    words = ["--engine", "vllm", "--engine-python", rig.python, "--model", rig.model, "--kinds", kind, "--runs", "1"]
    log = tmp_path / "bench.log"
    with log.open("wb") as out:
        bench = subprocess.Popen(
            [sys.executable, "-m", "plugin", "bench", "coldstart", *map(str, words)],
            env=rig.env(TMPDIR=str(temporary), ENGINE_DOUBLE_COMPILE_S="60"),
            cwd=REPO,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    try:
        until(lambda: any("api_server" in line for line in rig.watch.new()), log)
        bench.send_signal(number)
        assert bench.wait(60) == 128 + number, log.read_text()
    finally:
        bench.kill()
        bench.wait(10)
    assert "Traceback" not in log.read_text()
    assert rig.watch.gone() == set()
    assert list(temporary.glob("quickthaw-bench-*")) == []
    assert rig.library.names() == []


def test_what_a_dead_engine_leaves_in_its_group_ends_with_it(tmp_path):
    """An engine that SIGTERM ends while it loads has no time to end its workers."""
    marker = f"MARK={tmp_path}"
    command = Command(["sh", "-c", "sleep 60 & wait"], {"MARK": str(tmp_path)}, tmp_path / "log", tmp_path)
    command.start()
    until(lambda: len(processes(f"{marker}\0".encode())) == 2, command.log)
    assert command.stop() == -signal.SIGTERM
    until(lambda: not processes(f"{marker}\0".encode()), command.log)


def until(condition, log: Path):
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit, log.read_text()
        time.sleep(0.02)
