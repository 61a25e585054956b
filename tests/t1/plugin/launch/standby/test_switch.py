"""Two snapshot models of which one may be awake: each request is answered by its model, whatever it takes to make room."""

import http.client
import os
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from checkpoint.sandbox.process_tree import processes
from tests.kits.launch_rig import PROMPT, call
from tests.kits.switch_rig import NAMES, switching, take_all

OURS = os.readlink("/proc/self/ns/pid")
pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch"), pytest.mark.slow]


def test_an_engine_that_its_snapshot_restores_is_not_asked_to_shut_down(rig_of):
    """An engine that ignores SIGTERM would hold up the switch for the whole grace period."""
    rig = rig_of("sglang")
    answers = take_all(rig, ENGINE_DOUBLE_STUBBORN="1")
    with switching(rig) as started:
        for name in (*NAMES, *NAMES):
            assert started.ask_of(name) == answers[name]
        pools = started.pools()
        assert (pools["red"]["sleeps"], pools["blue"]["sleeps"]) == (2, 1)
        assert "SIGTERM" not in started.text()
        assert all(rig.library.working_set(name).exists() for name in NAMES), "what the first restores recorded is kept"


def test_models_are_moved_by_hand_with_the_token_only(rig_of):
    rig = rig_of("vllm")
    answers = take_all(rig)
    with switching(rig, QUICKTHAW_ADMIN_TOKEN="secret") as started:
        token = {"Authorization": "Bearer secret"}
        assert started.act("red", "wake")[0] == 401
        assert call(started.port, "POST", "/-/models/red/wake", **token) == (200, {"name": "red", "phase": "serving"})
        assert started.ask_of("red") == answers["red"]
        for _ in range(2):  # the second has nothing to do
            slept = call(started.port, "POST", "/-/models/red/sleep", **token)
            assert slept == (200, {"name": "red", "phase": "asleep"})
        for path, code in (("pink/sleep", "model-not-found"), ("red/fly", "not-found")):
            status, body = call(started.port, "POST", f"/-/models/{path}", **token)
            assert (status, body["error"]["code"]) == (404, code)
        foreign = token | {"Origin": "http://elsewhere.example"}
        status, body = call(started.port, "POST", "/-/models/red/wake", **foreign)
        assert (status, body["error"]["code"]) == (403, "admin-foreign-page")
        asked = {"model": "red", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
        assert call(started.port, "POST", "/v1/completions", asked)[1]["choices"][0]["token_ids"] == answers["red"]


def test_fifty_switches_from_standby_are_each_answered_by_the_right_model(rig_of):
    rig = rig_of("sglang")
    answers = take_all(rig)
    with switching(rig, more=", standby_after: 1h") as started:
        for number in range(50):
            name = NAMES[number % 2]
            assert started.ask_of(name) == answers[name], number
        pools = started.pools()
        assert (pools["red"]["standbys"], pools["blue"]["standbys"]) == (25, 24)
        assert (pools["red"]["sleeps"], pools["blue"]["sleeps"]) == (0, 0)
        assert (started.phase("red"), started.phase("blue")) == ("standby", "serving")
        listed = {model["id"]: model["phase"] for model in call(started.port, "GET", "/v1/models")[1]["data"]}
        assert listed == {"red": "standby", "blue": "serving"}
        assert started.act("red", "sleep") == (200, {"name": "red", "phase": "asleep"})
        assert started.ask_of("red") == answers["red"]


def test_requests_for_both_models_at_once_are_each_answered_by_the_right_one(rig_of):
    rig = rig_of("vllm")
    answers = take_all(rig)
    with switching(rig, more=", standby_after: 1h") as started, ThreadPoolExecutor(8) as pool:
        names = [NAMES[number * 7 % 3 % 2] for number in range(60)]
        assert list(pool.map(started.ask_of, names)) == [answers[name] for name in names]
        assert "standby-lost" not in started.text()


@pytest.mark.parametrize("victim", ["engine", "restore"])
def test_a_model_that_was_killed_in_standby_is_restored(rig_of, victim):
    rig = rig_of("sglang")
    answers = take_all(rig)
    with switching(rig, more=", standby_after: 1h") as started:
        for name in NAMES:
            assert started.ask_of(name) == answers[name]
        started.wait_phase("red", "standby")
        command = started.pools()["red"]["replicas"][0]["pid"]
        inside = [pid for pid in processes(command) if os.readlink(f"/proc/{pid}/ns/pid") != OURS]
        os.kill(command if victim == "restore" else inside[-1], signal.SIGKILL)
        if victim == "restore":
            started.wait_phase("red", "failed")
        assert started.ask_of("red") == answers["red"]
        assert started.ask_of("blue") == answers["blue"]


def test_with_workers_a_model_stands_by_once_all_of_them_are_quiet(rig_of):
    rig = rig_of("sglang")
    answers = take_all(rig)
    with switching(rig, "--workers", "2", more=", standby_after: 1h") as started, ThreadPoolExecutor(4) as pool:
        names = [NAMES[number % 2] for number in range(20)]
        assert list(pool.map(started.ask_of, names)) == [answers[name] for name in names]
        (serving,) = (name for name in NAMES if started.phase(name) == "serving")
        assert started.act(serving, "standby") == (200, {"name": serving, "phase": "standby"})
        assert started.ask_of(serving) == answers[serving]


SIX = ("ant", "bee", "cow", "dog", "elk", "fox")
REQUESTS = int(os.environ.get("STORM_REQUESTS", "400"))
BROKEN = {
    "cut",
    "wake-command-killed",
    "upstream-closed",
    "upstream-refused",
    "upstream-reset",
    "engine-died",
    "engine-gone",
    "wake-without-replica",
}
"""Codes of requests that were in an engine when it was killed: whether it ran them is unknown, so they are not sent again. And
of those whose restore was killed twice, or whose engine was killed as soon as it served, several times in a row."""
PAUSE_S = 0.02
"""Mean pause between two requests of a client."""


def workers_of(started):
    """The proxy's own processes that serve its port."""
    children = (child for task in Path(f"/proc/{started.process.pid}/task").iterdir() for child in read_children(task))
    return [pid for pid in children if b"plugin.proxy.workers" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def read_children(task):
    return map(int, (task / "children").read_text().split())


def test_requests_for_six_models_with_kills_are_each_answered_once_and_never_by_a_wrong_model(rig_of):
    rig = rig_of("sglang")
    answers = take_all(rig, SIX)
    draw, pauses = random.Random(7), random.Random(8)
    asked = [draw.choice(SIX) for _ in range(REQUESTS)]
    results, kills, over = [], [], threading.Event()
    settings = "max_awake: 2\nmin_awake: 0.05"
    with switching(rig, "--workers", "2", names=SIX, settings=settings, more=", standby_after: 1h") as started:

        def ask(name):
            time.sleep(pauses.expovariate(1 / PAUSE_S))
            body = {"model": name, "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
            try:
                results.append((name, *call(started.port, "POST", "/v1/completions", body)))
            except (http.client.HTTPException, ConnectionError):  # cut within its answer
                results.append((name, 0, {"error": {"code": "cut"}}))

        def kill():
            while not over.wait(1.0):
                pids = [pool["replicas"][0]["pid"] for pool in started.pools().values()]
                command = draw.choice([pid for pid in pids if pid] or [0])
                inside = [pid for pid in processes(command) if command and os.readlink(f"/proc/{pid}/ns/pid") != OURS]
                victim = draw.choice([command, *inside[1:]])
                if (
                    len(kills) % 40 == 10
                ):  # rarely: a worker that keeps dying is replaced after longer and longer pauses
                    victim = draw.choice(workers_of(started))
                if victim:
                    os.kill(victim, signal.SIGKILL)
                    kills.append(victim)

        def kill_all():
            while not over.is_set():
                try:
                    kill()
                except (OSError, http.client.HTTPException, AssertionError) as error:
                    print(f"no kill: {error}"[:300])
                    continue  # it had ended by itself, or the worker that was asked was killed

        killer = threading.Thread(target=kill_all)
        killer.start()
        try:
            with ThreadPoolExecutor(6) as pool:
                list(pool.map(ask, asked))
        finally:
            over.set()
            killer.join()
        assert len(results) == len(asked) and len(kills) > REQUESTS / 200
        wrong = [(n, s, b) for n, s, b in results if s == 200 and b["choices"][0]["token_ids"] != answers[n]]
        failed = [b["error"]["code"] for _, s, b in results if s != 200]
        codes = Counter(f"{s} {b['error']['code']}" if s != 200 else "200" for _, s, b in results)
        print(f"{len(asked)} requests, {len(kills)} kills, {len(wrong)} by a wrong model; {dict(codes)}")
        assert wrong == []
        assert set(failed) <= BROKEN and len(failed) <= 6 * len(kills), failed
        for name in SIX:
            assert started.ask_of(name) == answers[name]
