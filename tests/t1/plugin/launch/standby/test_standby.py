"""A launch in standby: frozen with its memory, continued by the next request, and never worse off for it."""

import contextlib
import http.client
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from checkpoint.sandbox.process_tree import processes
from plugin.proxy.admin.costs import memory_bytes
from tests.kits.launch_rig import call

pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch"), pytest.mark.slow]


def act(started, action):
    return call(started.port, "POST", f"/-/models/default/{action}")


def wait_phase(started, phase, limit_s=30.0):
    limit = time.monotonic() + limit_s
    while started.status()[0]["phase"] != phase:
        assert time.monotonic() < limit, (started.status(), started.text()[-3000:])
        time.sleep(0.02)


def engine_pids(started):
    """The engine's processes on this host, the server first."""
    return processes(started.status()[0]["pid"])


def pool(started):
    return call(started.port, "GET", "/-/status")[1]["pools"][0]


def test_an_idle_engine_stands_by_and_the_next_request_continues_it(rig):
    with rig.running("--standby-after", "0.3") as started:
        answer = started.ask()
        before = None
        for _ in range(3):
            wait_phase(started, "standby")
            before = before or engine_pids(started)
            for probe in ("/health", "/ping", "/-/ready", "/-/live"):
                assert call(started.port, "GET", probe)[0] == 200
            assert call(started.port, "GET", "/v1/models")[0] in (200, 503)
            assert started.get("/-/metrics")
            time.sleep(0.3)
            assert started.status()[0]["phase"] == "standby", "no probe wakes it"
            assert started.ask() == answer
            assert engine_pids(started) == before, "the same processes"
        assert pool(started)["starts"].keys() <= {"cold", "woken"} and "woken" in pool(started)["starts"]
        assert 'phase="standby"' in started.get("/-/metrics")
        assert "standby-lost" not in started.text()
    wakes = [json.loads(line) for line in (rig.home / "wake-times.jsonl").read_text().splitlines()]
    assert len(wakes) == 3 and all(0 < wake["seconds"] < 30 and wake["memory_bytes"] > 4 << 20 for wake in wakes)


def test_the_cache_leaves_the_memory(rig):
    with rig.running() as started:
        started.ask()
        started.wait_serving()
        started.complete("fills the cache", max_tokens=2)
        assert act(started, "standby") == (200, {"name": "default", "phase": "standby"})
        held = pool(started)["replicas"][0]["memory_bytes"]
        assert held and held > 4 << 20, "its weights stay, and are counted"
        assert act(started, "wake") == (200, {"name": "default", "phase": "serving"})
        calls = started.facts()["worker"]["calls"]
        assert ["flush_cache"] in calls or ["collective_rpc", "quickthaw_drop_cache"] in calls


def test_a_restored_engine_in_standby_holds_no_more_than_its_images(rig):
    rig.take()
    (name,) = rig.library.names()
    with rig.running() as started:
        started.ask()
        started.wait_serving()
        for _ in range(2):
            assert act(started, "standby")[0] == 200
            held = sum(map(memory_bytes, engine_pids(started)))
            assert held <= rig.library.load(name).image_bytes
            started.ask()


def test_without_cgroups_signals_freeze_it(rig_of):
    """In a mount namespace of its own, without the file system of cgroups."""
    rig = rig_of("sglang")
    hidden = ["unshare", "--mount", "sh", "-c", 'umount -R -l /sys/fs/cgroup; exec "$@"', "sh"]
    with rig.running("--standby-after", "0.3", prefix=hidden) as started:
        answer = started.ask()
        wait_phase(started, "standby")
        states = {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in engine_pids(started)}
        assert states == {"T"}
        assert started.ask() == answer


@pytest.mark.parametrize("victim", ["server", "worker"])
def test_an_engine_that_was_killed_in_standby_is_restored(rig_of, victim):
    rig = rig_of("sglang")
    answer = rig.take()
    with rig.running("--standby-after", "0.3") as started:
        assert started.ask() == answer
        wait_phase(started, "standby")
        server, *workers = engine_pids(started)
        killed = server if victim == "server" else workers[-1]
        os.kill(killed, signal.SIGKILL)
        if victim == "server":
            wait_phase(started, "asleep")
        else:
            limit = time.monotonic() + 10
            while Path(f"/proc/{killed}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                assert time.monotonic() < limit
                time.sleep(0.01)
        assert started.ask() == answer
        assert "standby-lost" in started.text() and "restoring" in started.text()


def test_an_engine_that_does_not_continue_is_restored(rig_of):
    """Somebody stops its server meanwhile, which no thaw undoes."""
    rig = rig_of("vllm")
    answer = rig.take()
    # The double's server answers no probe while it is stopped; the limit is the launch's own.
    with rig.running("--standby-after", "0.3") as started:
        assert started.ask() == answer
        wait_phase(started, "standby")
        os.kill(engine_pids(started)[0], signal.SIGSTOP)
        assert started.ask() == answer
        assert "standby-lost" in started.text()


def test_without_a_snapshot_an_engine_that_was_killed_in_standby_starts_cold(rig_of):
    rig = rig_of("vllm")
    with rig.running("--no-snapshot", "--standby-after", "0.3") as started:
        answer = started.ask()
        wait_phase(started, "standby")
        status, refusal = act(started, "sleep")
        assert (status, refusal["error"]["code"]) == (503, "no-snapshot"), "its state is nowhere else"
        assert started.status()[0]["phase"] == "standby"
        os.kill(engine_pids(started)[0], signal.SIGKILL)
        assert started.ask() == answer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_launch_that_ends_in_standby_leaves_nothing(rig_of, number):
    rig = rig_of("sglang")
    started = rig.start("--standby-after", "0.3")
    started.ask()
    wait_phase(started, "standby")
    pids = engine_pids(started)
    assert started.stop(number) in (143, -9)
    limit = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < limit
        time.sleep(0.02)
    assert rig.watch.gone() == set()


def test_a_stop_on_the_way_to_standby_leaves_nothing(rig_of):
    rig = rig_of("vllm")
    rig.take()
    for delay in (0.0, 0.01, 0.03, 0.06):
        started = rig.start()
        started.ask()
        started.wait_serving()
        answers = []

        def move(port=started.port, answers=answers):
            with contextlib.suppress(OSError, http.client.HTTPException):  # the launch ends under it
                answers.append(call(port, "POST", "/-/models/default/standby"))

        mover = threading.Thread(target=move)
        mover.start()
        time.sleep(delay)
        assert started.stop() in (0, 143), started.text()[-3000:]
        mover.join()
        assert "Traceback" not in started.ours() and "defect" not in started.text()
        assert rig.watch.gone() == set()


def test_a_request_during_the_way_to_standby_is_answered(rig_of):
    rig = rig_of("sglang")
    with rig.running() as started:
        answer = started.ask()
        started.wait_serving()
        moves = []
        for _ in range(10):
            mover = threading.Thread(target=lambda: moves.append(act(started, "standby")[0]))
            mover.start()
            assert started.ask() == answer
            mover.join()
        assert set(moves) <= {200, 503} and 200 in moves


def test_from_standby_to_sleep_to_a_restore(rig_of):
    rig = rig_of("vllm")
    with rig.running("--standby-after", "0.2", "--sleep-after", "1") as started:
        answer = started.ask()
        wait_phase(started, "standby")
        wait_phase(started, "asleep")
        assert started.ask() == answer
        assert (pool(started)["standbys"], pool(started)["sleeps"]) >= (1, 1)


def test_replicas_stand_by_and_come_back_together(rig_of):
    rig = rig_of("sglang")
    answer = rig.take()
    with rig.running("--replicas", "2", "--standby-after", "0.3") as started:
        assert started.ask() == answer
        limit = time.monotonic() + 30
        while {replica["phase"] for replica in started.status()} != {"standby"}:
            assert time.monotonic() < limit, started.text()[-3000:]
            time.sleep(0.02)
        assert started.ask() == answer


def test_the_commands_show_and_move_a_model(rig_of):
    rig = rig_of("sglang")
    with rig.running("--admin-token", "secret") as started:
        started.complete()
        here = {"QUICKTHAW_URL": f"http://127.0.0.1:{started.port}", "QUICKTHAW_ADMIN_TOKEN": "secret"}
        limit = time.monotonic() + 30
        while "serving" not in (listed := rig.cli("ps", **here).stdout):
            assert time.monotonic() < limit, listed
        for action, phase in (("standby", "standby"), ("wake", "serving"), ("sleep", "asleep")):
            done = rig.cli(action, "default", **here)
            assert (done.returncode, done.stdout) == (0, f"default is {phase}\n"), done.stderr
            assert phase in rig.cli("ps", **here).stdout
        refused = rig.cli("wake", "default", **here | {"QUICKTHAW_ADMIN_TOKEN": "wrong"})
        assert refused.returncode == 1 and refused.stderr.startswith("quickthaw: admin-token: ")
        unknown = rig.cli("wake", "pink", **here)
        assert unknown.returncode == 1 and unknown.stderr.startswith("quickthaw: model-not-found: ")
    gone = rig.cli("ps", **here)
    assert gone.returncode == 1 and gone.stderr.startswith("quickthaw: not-reached: "), gone.stderr


def test_an_engine_that_is_busy_for_a_moment_after_its_last_answer_is_asked_again(rig_of):
    """SGLang answers a request before it counts itself idle, and warms up beside the first requests."""
    rig, busy = rig_of("sglang"), {"ENGINE_DOUBLE_BUSY_FLUSHES": "9"}
    with rig.running("--no-snapshot", env=busy) as started:
        answer = started.ask()
        assert act(started, "standby") == (200, {"name": "default", "phase": "standby"})
        assert started.ask() == answer
    rig.take(env=busy)
    assert rig.library.names()
