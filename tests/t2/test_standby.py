"""Real engines in standby: they continue with the answers that they gave before, also after longer than their watchdogs wait."""

import json
import time
from pathlib import Path

import pytest

from checkpoint.sandbox.process_tree import processes
from plugin.bench import client as measure
from plugin.proxy.admin.costs import memory_bytes
from tests.kits.engine_kit import NAME, Rig, post, share_state
from tests.kits.memory_kit import mapped_pages

pytestmark = [pytest.mark.t2, pytest.mark.timeout(1200)]
LONG = "The river runs. " * 150
LEAST_CACHE = 10 << 20
"""Of the KV cache of 600 tokens, which takes 14 MB."""
GROWTH = 8 << 20
"""Bytes by which an engine, and its launcher, may grow over 18 standbys."""
LEAST_SHARED = 100 << 20
"""Of SmolLM2's 270 MB of weights, some of which the allocator shares a page with."""


def act(port, action):
    status, body = post(port, f"/-/models/default/{action}", {}, timeout_s=120)
    assert status == 200, body
    return json.loads(body)["phase"]


def replica(port):
    return measure.status(port)["pools"][0]["replicas"][0]


def wait_pages(port):
    """Wait until the restored engine has all of its pages."""
    limit = time.monotonic() + 60
    while replica(port)["pages"].get("left"):
        assert time.monotonic() < limit
        time.sleep(0.1)


def memory_of(pid):
    return sum(map(memory_bytes, processes(pid)))


def ask(port, rig, prompt="The capital of France is"):
    body = {"model": str(rig.preset.model), "prompt": prompt, "max_tokens": 8, "temperature": 0}
    status, answer = post(port, "/v1/completions", body, timeout_s=120)
    assert status == 200, answer
    return json.loads(answer)["choices"][0]["text"]


def processor_ticks(pid):
    """Clock ticks that an engine's processes have used (proc(5): utime, stime)."""
    fields = [Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split() for one in processes(pid)]
    return sum(int(found[11]) + int(found[12]) for found in fields)


def test_an_engine_continues_with_the_same_answers_and_holds_no_more_than_its_images(rig):
    images = rig.library.load(NAME).image_bytes
    if not rig.library.working_set(NAME).exists():
        with rig.running() as (port, *_):  # a restore that records maps no weights
            ask(port, rig)
    with rig.running() as (port, _, _, command):
        answer = ask(port, rig)
        wait_pages(port)
        for _ in range(3):
            ask(port, rig, LONG)
            pid = replica(port)["pid"]
            serving = memory_of(pid)
            assert act(port, "standby") == "standby"
            before, held = processor_ticks(pid), memory_of(pid)
            assert held <= images and serving - held >= LEAST_CACHE
            shared, copied = mapped_pages(processes(pid))
            assert shared >= LEAST_SHARED > copied, "its weights are the page cache's"
            time.sleep(1.0)
            assert measure.status(port)["pools"][0]["replicas"][0]["phase"] == "standby"
            assert processor_ticks(replica(port)["pid"]) == before
            assert ask(port, rig) == answer
        assert "standby-lost" not in command.log.read_text(errors="replace")


def test_twenty_standbys_leave_no_memory(rig):
    with rig.running() as (port, _, _, command):
        answer, sizes, own = ask(port, rig), [], []
        wait_pages(port)
        for _ in range(20):
            assert act(port, "standby") == "standby"
            sizes.append(memory_of(replica(port)["pid"]))
            own.append(memory_bytes(command.process.pid))
            assert ask(port, rig) == answer
        print(
            f"{rig.engine}: MB in standby {[round(size / 1e6, 1) for size in sizes]}, launcher {[round(s / 1e6, 1) for s in own]}"
        )
        assert max(sizes[2:]) - sizes[1] < GROWTH and max(own[2:]) - own[1] < GROWTH
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
