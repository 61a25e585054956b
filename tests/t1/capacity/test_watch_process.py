"""`--watch` as a process: it follows the file, says what is wrong with it and goes on, and ends on a signal."""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.t1

REPO = Path(__file__).resolve().parents[3]
LIMIT = 60.0


def lines(process, count):
    """The next `count` lines, within LIMIT."""
    found, rest = [], b""
    deadline = time.monotonic() + LIMIT
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while len(found) < count:
            assert selector.select(max(0.0, deadline - time.monotonic())), f"only {found} within {LIMIT} s"
            piece = os.read(process.stdout.fileno(), 65536)
            assert piece, (process.wait(LIMIT), process.stderr.read())
            *whole, rest = (rest + piece).split(b"\n")
            found += [json.loads(line) for line in whole]
    return found


def test_watch_follows_the_file_and_ends_on_a_signal(tmp_path):
    plan = tmp_path / "plan.yaml"
    good = (REPO / "examples" / "plan_trace.yaml").read_text()
    plan.write_text(good)
    command = [sys.executable, "-c", "from capacity.cli import plan; plan()", str(plan), "--watch", "0.2", "--json"]
    command += ["--state", str(tmp_path / "state.json"), "--apply", f"cat >> {tmp_path / 'applied'}"]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        first = lines(process, 1)[0]
        assert first["start"]["h100-a"] > 0

        part = tmp_path / "plan.part"
        part.write_text(good.replace("12.0 $/h", "-1"))
        part.replace(plan)
        deadline = time.monotonic() + LIMIT
        while not (told := [line["error"] for line in lines(process, 1) if "error" in line]):
            assert time.monotonic() < deadline
        assert set(told) == {"negative"}

        part.write_text(good.replace("[12000]", "[16000]").replace("[5000]", "[9000]"))
        part.replace(plan)
        while not any(line.get("start") for line in lines(process, 1)):
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0
        state = json.loads((tmp_path / "state.json").read_text())
        applied = [json.loads(text + "]}") for text in (tmp_path / "applied").read_text().split("]}") if text]
        assert sum(entry["count"] for delta in applied for entry in delta["delta"]) == state["held"]["h100-a"]
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(LIMIT)
        process.stdout.close()
        process.stderr.close()


@pytest.mark.slow
def test_a_signal_ends_the_apply_command_too_and_what_it_did_is_kept(tmp_path):
    plan, state = tmp_path / "plan.yaml", tmp_path / "state.json"
    plan.write_text((REPO / "examples" / "plan_trace.yaml").read_text())
    mark = tmp_path / "mark"
    script = f"""echo '{{"granted": {{"h100-a": 1}}}}'; touch {mark}; sleep 100"""
    command = [sys.executable, "-c", "from capacity.cli import plan; plan()", str(plan), "--watch", "60", "--json"]
    command += ["--state", str(state), "--apply", script]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + LIMIT
        while not mark.exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 1 and b"apply-interrupted" in out
        assert json.loads(state.read_text())["held"]["h100-a"] == 1
    finally:
        process.kill()
        process.communicate()
