"""When a rehearsal begins and when memory is too short for one."""

import sys
import types

import pytest

from checkpoint.snapshot import manifest, rehearsal
from plugin.proxy.endpoints.models_file import ModelConfig, spec_of
from plugin.rehearsal import beside, memory
from plugin.rehearsal.beside import LATEST_S, PAUSE_S, QUIET_S, TRIES, Beside, Timing
from plugin.rehearsal.process import Order
from plugin.rehearsal.yielding import CALM_S, GIVE_UP_S, YIELD_S, Course, MeanTime, Yielding
from tests.kits.checkpoint.snapshots import draft

pytestmark = pytest.mark.t0
GB = 1 << 30


def test_it_begins_once_no_request_has_been_there_for_a_while():
    timing = Timing()
    assert not timing.may_begin(0.0, due=True, busy=False)
    assert not timing.may_begin(QUIET_S / 2, due=True, busy=True)  # counts from here again
    assert not timing.may_begin(QUIET_S, due=True, busy=False)
    assert timing.may_begin(2 * QUIET_S, due=True, busy=False)


def test_it_begins_at_the_latest_although_requests_are_there():
    timing = Timing()
    assert not timing.may_begin(0.0, due=True, busy=True)
    assert not timing.may_begin(LATEST_S - 1, due=True, busy=True)
    assert timing.may_begin(LATEST_S, due=True, busy=True)


def test_a_start_of_the_engine_begins_the_wait_anew():
    timing = Timing()
    timing.may_begin(0.0, due=True, busy=False)
    assert not timing.may_begin(QUIET_S, due=False, busy=False)
    assert not timing.may_begin(LATEST_S, due=True, busy=False)
    assert timing.may_begin(LATEST_S + QUIET_S, due=True, busy=False)


def test_a_dropped_one_is_tried_again_after_growing_pauses_and_then_no_more():
    timing, now = Timing(), 0.0
    for number in range(TRIES):
        assert timing.not_before <= now + PAUSE_S * 2**number
        timing.dropped(now)
        assert not timing.may_begin(now + PAUSE_S * 2**number - 1, due=True, busy=False)
        now = timing.not_before
        timing.may_begin(now, due=True, busy=False)
        assert timing.may_begin(now + QUIET_S, due=True, busy=False) == (number + 1 < TRIES)


class Host:
    """The files that the kernel shows of a host's memory, and of a control group's."""

    def __init__(self, folder):
        self.proc, self.groups = folder / "proc", folder / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "pressure").mkdir()
        self.groups.mkdir()
        (self.proc / "self" / "cgroup").write_text("")
        (self.proc / "self" / "mountinfo").write_text(
            f"31 23 0:28 / {self.groups} rw - cgroup2 cgroup2 rw,nsdelegate\n"
            f"32 31 0:29 / {self.groups / 'memory'} rw shared:9 - cgroup cgroup rw,cpu,memory\n"
        )
        self.meminfo(24 * GB, 20 * GB)

    def meminfo(self, total, available):
        text = f"MemTotal:       {total >> 10} kB\nMemAvailable:   {available >> 10} kB\n"
        (self.proc / "meminfo").write_text(text)

    def group(self, line, folder, files):
        (self.proc / "self" / "cgroup").write_text(line + "\n")
        place = self.groups / folder
        place.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (place / name).write_text(text)

    def stalled(self, percent):
        text = f"some avg10=90.00 avg60=0.00 avg300=0.00 total=0\nfull avg10={percent} avg60=0.00 avg300=0.00 total=0\n"
        (self.proc / "pressure" / "memory").write_text(text)

    def short(self, needed):
        return memory.short(needed, self.proc)


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


def test_memory_is_short_where_a_second_engine_would_leave_no_margin(host):
    assert host.short(3 * GB) == ""
    assert host.short(19 * GB).startswith("21.5 GB of memory are available")


@pytest.mark.parametrize(
    ("line", "folder", "files"),
    [
        (
            "0::/a/b",
            "a",
            {"memory.max": f"{4 * GB}", "memory.current": f"{3 * GB}", "memory.stat": f"inactive_file {GB}\nother 1\n"},
        ),
        (
            "5:cpu,memory:/a",
            "memory/a",
            {
                "memory.limit_in_bytes": f"{4 * GB}",
                "memory.usage_in_bytes": f"{3 * GB}",
                "memory.stat": f"inactive_file 5\ntotal_inactive_file {GB}\n",
            },
        ),
    ],
    ids=["v2, of the parent", "v1"],
)
def test_the_limit_of_a_control_group_counts_with_its_page_cache(host, line, folder, files):
    (host.groups / "a" / "b").mkdir(parents=True)
    host.group(line, folder, files)
    assert host.short(GB) == ""
    assert "2.1 GB of memory are available" in host.short(2 * GB)


def test_a_group_without_a_limit_changes_nothing(host):
    host.group("0::/", ".", {"memory.max": "max", "memory.current": "5", "memory.stat": ""})
    assert host.short(3 * GB) == ""


def test_memory_is_short_where_processes_wait_for_it_and_little_is_left(host):
    host.stalled(30)
    assert host.short(3 * GB) == ""  # they wait for the memory of another group
    host.meminfo(24 * GB, 8 * GB)
    assert "30 %" in host.short(3 * GB)
    host.stalled(1)
    assert host.short(3 * GB) == ""


@pytest.mark.parametrize(
    ("lazy", "store", "pushed_to", "left"),
    [
        (True, None, None, True),  # this host has no plans
        (False, None, None, False),
        (False, "s3://a", None, True),
        (False, "s3://a", "s3://a", False),
        (False, "s3://a", "s3://b", True),
    ],
)
def test_what_is_left_to_do_with_a_rehearsed_snapshot(tmp_path, lazy, store, pushed_to, left):
    folder = tmp_path / "snapshots" / "one"
    folder.mkdir(parents=True)
    (folder / manifest.FILE_NAME).write_bytes(manifest.dump(draft("one", 1)))
    found = manifest.load(folder)
    settings = types.SimpleNamespace(home=tmp_path, lazy_restore=lazy, push_to=store or "")
    assert not Beside(settings, [], None)._nothing_to_do(found)
    rehearsal.write(folder, rehearsal.Mark(found.digest, "2026-01-01T00:00:00Z", ["short"], 1.0))
    if pushed_to:
        rehearsal.note_pushed(folder, pushed_to)
    assert Beside(settings, [], None)._nothing_to_do(found) is not left


@pytest.mark.parametrize(("chosen", "seen"), [({"CUDA_VISIBLE_DEVICES": "1"}, "1"), ({}, "both")])
def test_a_rehearsal_sees_the_gpus_of_the_replica_beside_it(tmp_path, monkeypatch, chosen, seen):
    """The snapshot of a replica that has its own GPU would not fit a process that sees all of the host's."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "both")
    says = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    monkeypatch.setattr(beside, "own_module", lambda name: [sys.executable, "-c", says])
    settings = types.SimpleNamespace(home=tmp_path, environment={"HOME": "/", **chosen})
    process = Beside(settings, [], None)._start(Order(home=str(tmp_path), name="one"))
    assert process.communicate(timeout=30)[0].decode().strip() == seen


# Yielding to requests


def closed_loop(meant, begin, seconds, takes, course=None, answered=0):
    """Sample a client that asks one request after the other, each taking `takes` seconds; return the courses."""
    now, since, every = begin, begin, 0.02
    courses = []
    while now < begin + seconds:
        if now - since >= takes:
            answered, since = answered + 1, now
        if course is None:
            meant.add(now, 1, answered)
        else:
            courses.append(course(now, 1, answered))
        now += every
    return courses


def test_the_mean_time_follows_from_what_is_there_and_what_gets_done():
    meant = MeanTime()
    assert meant.seconds is None
    closed_loop(meant, 0.0, 30.0, 0.5)
    assert meant.seconds == pytest.approx(0.5, rel=0.1)
    idle = MeanTime()
    for number in range(1000):
        idle.add(number * 0.1, 0, 0)
    assert idle.seconds is None  # nobody asked


def test_it_pauses_while_a_request_is_there_and_goes_on_after():
    yielding = Yielding(MeanTime())
    assert yielding.course(0.0, 0, 0) is Course.RUN
    assert yielding.course(1.0, 1, 0) is Course.PAUSE
    assert yielding.course(2.0, 1, 0) is Course.PAUSE
    assert yielding.course(2.01, 0, 1) is Course.PAUSE
    assert yielding.course(2.02 + CALM_S, 0, 1) is Course.RUN


def test_it_runs_beside_requests_that_are_always_there():
    yielding = Yielding(MeanTime())
    courses = closed_loop(yielding, 0.0, YIELD_S + 20, 0.5, yielding.course)
    assert courses[0] is Course.PAUSE and courses[-1] is Course.RUN
    assert 0.98 * YIELD_S < 0.02 * courses.count(Course.PAUSE) < 1.05 * YIELD_S


@pytest.mark.parametrize(("takes", "last"), [(0.53, Course.RUN), (0.7, Course.DROP)])
def test_it_is_dropped_once_requests_take_longer_beside_it(takes, last):
    yielding = Yielding(MeanTime())
    closed_loop(yielding, 0.0, YIELD_S + 0.5, 0.5, yielding.course)
    courses = closed_loop(yielding, YIELD_S + 0.5, 30.0, takes, yielding.course, answered=61)
    assert courses[0] is Course.RUN and courses[-1] is last
    assert bool(yielding.why) == (last is Course.DROP)


def test_under_a_limit_of_processor_time_it_never_runs_beside_requests():
    yielding = Yielding(MeanTime(), may_run_beside=False)
    courses = closed_loop(yielding, 0.0, GIVE_UP_S + 10, 0.5, yielding.course)
    assert Course.RUN not in courses and courses[-1] is Course.DROP


def test_it_is_dropped_where_requests_are_always_there_and_nothing_is_known_of_them():
    yielding = Yielding(MeanTime())
    courses = closed_loop(yielding, 0.0, GIVE_UP_S + 10, 1e9, yielding.course)
    assert Course.RUN not in courses and courses[-1] is Course.DROP


@pytest.mark.parametrize(
    ("given", "set_before", "variables"),
    [
        ({}, None, {"QUICKTHAW_REHEARSE": "0"}),
        ({}, "1", {}),
        ({"rehearse": True}, None, {"QUICKTHAW_REHEARSE": "1"}),
        ({"rehearse": False}, "1", {"QUICKTHAW_REHEARSE": "0"}),
        ({"push": False}, "1", {"QUICKTHAW_PUSH": "0"}),
        ({"push": True}, "1", {"QUICKTHAW_PUSH": "1"}),
    ],
)
def test_a_model_of_the_proxy_s_file_may_say_whether_it_is_rehearsed_and_pushed(
    given, set_before, variables, monkeypatch
):
    monkeypatch.delenv("QUICKTHAW_REHEARSE", raising=False)
    if set_before is not None:
        monkeypatch.setenv("QUICKTHAW_REHEARSE", set_before)
    spec = spec_of(ModelConfig(command="quickthaw launch vllm --port ${PORT}", **given), 0.0)
    assert {name: value for name, value in spec.environment if name != "PORT"} == variables
