"""Real engines in standby: they continue with the answers that they gave before, also after longer than their watchdogs wait."""

import json
import time
from pathlib import Path

import pytest

from checkpoint.sandbox.process_tree import processes
from plugin.bench import client as measure
from tests.kits.engine_kit import Rig, post, share_state

pytestmark = [pytest.mark.t2, pytest.mark.timeout(1200)]


def act(port, action):
    status, body = post(port, f"/-/models/default/{action}", {}, timeout_s=120)
    assert status == 200, body
    return json.loads(body)["phase"]


def replica(port):
    return measure.status(port)["pools"][0]["replicas"][0]


def ask(port, rig):
    body = {"model": str(rig.preset.model), "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    status, answer = post(port, "/v1/completions", body, timeout_s=120)
    assert status == 200, answer
    return json.loads(answer)["choices"][0]["text"]


def processor_ticks(pid):
    """Clock ticks that an engine's processes have used (proc(5): utime, stime)."""
    fields = [Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split() for one in processes(pid)]
    return sum(int(found[11]) + int(found[12]) for found in fields)


def test_an_engine_continues_with_the_same_answers(rig):
    with rig.running() as (port, _, _, command):
        answer = ask(port, rig)
        for _ in range(3):
            assert act(port, "standby") == "standby"
            before = processor_ticks(replica(port)["pid"])
            time.sleep(1.0)
            assert measure.status(port)["pools"][0]["replicas"][0]["phase"] == "standby"
            assert processor_ticks(replica(port)["pid"]) == before
            assert ask(port, rig) == answer
        assert "standby-lost" not in command.log.read_text(errors="replace")


def test_a_watchdog_does_not_count_the_time_in_standby(tmp_path):
    share_state(tmp_path)
    rig = Rig("sglang", tmp_path)
    arguments = [*rig.preset.arguments, "--watchdog-timeout", "5"]
    with rig.running("--no-snapshot", arguments=arguments) as (port, _, _, command):
        answer = ask(port, rig)
        pid = replica(port)["pid"]
        for seconds in (12.0, 1.0):
            act(port, "standby")
            time.sleep(seconds)
            assert ask(port, rig) == answer
        time.sleep(6.0)  # its watchdog looks every 2.5 s
        assert ask(port, rig) == answer
        text = command.log.read_text(errors="replace")
        assert "watchdog timeout" not in text and "standby-lost" not in text
        assert replica(port)["pid"] == pid, "the same engine"
