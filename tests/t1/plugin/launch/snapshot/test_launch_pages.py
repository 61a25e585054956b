"""A page server that dies or hangs at every moment of a restore and after it: no request is lost, and no process blocks forever."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from launchers.bare import free_port
from tests.t1.plugin.launch.snapshot.test_launch_damage import flip

pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch"), pytest.mark.slow]
RESTORED = ["mounting", "restoring", "waking", "verifying"]
COLD = "quickthaw: starting"


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def name_of(pid):
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def page_server(started, limit_s=10.0):
    """Return the page server of a launch as soon as it exists (it may be prestarted, without a configuration yet)."""
    limit = time.monotonic() + limit_s
    while time.monotonic() < limit:
        for pid in children(started.process.pid):
            if name_of(pid) == "quickthaw-pages\n":
                return pid
        time.sleep(0.001)
    raise AssertionError(started.text()[-3000:])


@pytest.fixture
def taken(launch_rig):
    """Take a snapshot with a working set and a saved plan: the next restore of the same command line begins speculatively."""
    port = free_port()
    answer = launch_rig.take(port=port)
    for _ in range(2):
        with launch_rig.running(port=port) as started:
            for _ in range(4):
                assert started.ask() == answer
            started.wait_serving()
    return launch_rig, answer, port


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_page_server_killed_at_any_moment_costs_time_only(taken, number):
    rig, answer, port = taken
    moments = [0.0, 0.02, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, 0.12, 0.15, 0.2, 0.3]
    lost = 0
    for after in moments[:: 1 if number == signal.SIGKILL else 4]:
        with rig.running(port=port) as started:
            pid = page_server(started)
            time.sleep(after)
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # it has finished
            began = time.monotonic()
            assert started.ask() == answer
            assert time.monotonic() - began < 40
            lost += "page server is gone" in started.ours()
            started.wait_serving()
            assert started.ask() == answer
            assert COLD not in started.ours(), started.ours()
    assert lost


def test_a_request_in_flight_is_sent_again(launch_rig):
    """While a working set is recorded the page server runs until three requests were answered: kill it during the second."""
    rig = launch_rig
    answer = rig.take()
    with rig.running() as started:
        assert started.ask() == answer
        started.wait_serving()
        pid = page_server(started)
        got = []
        asking = threading.Thread(target=lambda: got.append(started.ask(slow=2.0)))
        asking.start()
        limit = time.monotonic() + 30
        while started.status()[0]["outstanding"] != 1:
            assert time.monotonic() < limit, started.text()
            time.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
        asking.join(30)
        assert got == [answer], started.text()
        ours = started.ours()
        assert "restoring it" in ours and COLD not in ours, ours
        (replica,) = started.status()
        assert replica["pages"]["lost"] == 1
        assert [span["phase"] for span in replica["timeline"]] == RESTORED


def test_a_stop_does_not_wait_for_a_stopped_page_server(taken):
    rig, _, port = taken
    started = rig.start(port=port)
    os.kill(page_server(started), signal.SIGSTOP)
    started.wait_for("quickthaw: restoring")  # on a busy machine the imports before it take longer than a second
    time.sleep(0.5)
    assert started.stop(limit_s=20) == 143
    assert "Traceback" not in started.text(), started.text()
    assert rig.watch.gone() == set()


def test_a_page_servers_counts_are_in_the_status(launch_rig):
    rig = launch_rig
    rig.take()
    with rig.running() as started:
        for _ in range(4):
            started.ask()
        limit = time.monotonic() + 20
        while (pages := started.status()[0]["pages"])["left"] or not pages["bytes_rest"]:
            assert time.monotonic() < limit, pages
            time.sleep(0.1)
        assert pages["faults"] > 0 and pages["stall_s"] > 0 and pages["bytes_faulted"] > 0 and pages["lost"] == 0
        metrics = started.get("/-/metrics")
        assert f'quickthaw_page_faults_total{{pool="default",replica="r0"}} {pages["faults"]:.1f}' in metrics, metrics
        assert 'quickthaw_page_bytes_total{pool="default",replica="r0",source="rest"}' in metrics


def test_a_damaged_working_set_is_recorded_again(taken):
    rig, answer, _ = taken
    known = rig.library.working_set(rig.name)
    flip(known)
    damaged = known.read_bytes()
    shown = rig.cli("snapshot", "inspect", rig.name)
    assert shown.returncode == 0, shown
    assert "[working-set-unreadable]" in shown.stdout and "saves a cold start of" in shown.stdout, shown
    for warned in (True, False):
        with rig.running() as started:
            for _ in range(4):
                assert started.ask() == answer
            started.wait_serving()
            assert ("records it again" in started.ours()) is warned, started.ours()
            assert COLD not in started.ours()
    assert known.read_bytes() != damaged
    shown = rig.cli("snapshot", "inspect", rig.name)
    assert "working-set-unreadable" not in shown.stdout and "by CRIU" in shown.stdout, shown
    assert list((rig.home / "run").glob("next-*.json"))
    assert rig.cli("snapshot", "rm", rig.name).returncode == 0
    assert not list((rig.home / "run").glob("next-*.json"))


def test_no_lazy_leaves_no_page_server_and_no_fault(launch_rig):
    """Every page is in place before the engine runs; a page server that dies meanwhile costs time only."""
    rig, port = launch_rig, free_port()
    answer = rig.take()
    for killed in (False, False, True):  # the second and third begin with the plan of the first
        with rig.running("--no-lazy", port=port) as started:
            if killed:
                os.kill(page_server(started), signal.SIGKILL)
            assert started.ask() == answer
            started.wait_serving()
            assert COLD not in started.ours(), started.ours()
            assert list((rig.home / "run").glob("next-*.json"))
            assert not [pid for pid in children(started.process.pid) if name_of(pid) == "quickthaw-pages\n"]
            (replica,) = started.status()
            assert [span["phase"] for span in replica["timeline"]][-4:] == RESTORED
            assert replica["pages"]["faults"] == 0


def test_a_launch_killed_while_pages_are_filled_leaves_nothing(launch_rig):
    rig = launch_rig
    answer = rig.take()
    for after in (0.0, 0.1, 0.2, 0.3, 0.4, 0.6):
        started = rig.start("--no-lazy")
        page_server(started)
        time.sleep(after)
        started.stop(signal.SIGKILL)
        assert {left for left in rig.watch.gone() if not left.startswith(str(rig.home))} == set()
    with rig.running("--no-lazy") as started:
        assert started.ask() == answer
        assert COLD not in started.ours(), started.ours()
    assert not list((rig.home / "run").glob("restore-*"))
