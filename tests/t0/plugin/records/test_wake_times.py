"""Measured wakes from standby: what is kept of each, and what reads them."""

import json
from types import SimpleNamespace

import pytest

from plugin.proxy.pool.start_times import Kind
from plugin.records import lead_times, wake_times
from plugin.records.wake_times import Rest

pytestmark = pytest.mark.t0


def settings(home, model="m"):
    return SimpleNamespace(home=home, engine="vllm", command=SimpleNamespace(model=model))


def test_a_wake_is_kept_with_what_standby_cost_and_the_deadlines_read_it(tmp_path):
    here = settings(tmp_path)
    wake_times.remember(here, 0.12345, Rest(0.03, 1 << 30, 2 << 30))
    wake_times.remember(settings(tmp_path, "other"), 9.0, Rest(0.03))
    wake_times.remember(here, 0.2, Rest(0.04))
    lines = [json.loads(line) for line in (tmp_path / wake_times.FILE).read_text().splitlines()]
    assert lines[0] | {"at": ""} == {
        "model": "m",
        "engine": "vllm",
        "seconds": 0.1235,
        "enter_s": 0.03,
        "memory_bytes": 1 << 30,
        "gpu_bytes": 2 << 30,
        "at": "",
    }
    assert "memory_bytes" not in lines[1]
    assert lead_times.history_for(here).seen(Kind.WOKEN) == (0.1235, 0.2)
    assert not (tmp_path / lead_times.FILE).exists(), "a wake is no start"


def test_a_capacity_plan_reads_them(tmp_path):
    from capacity.inputs import lead_times as planned

    for seconds, held in ((0.1, 1 << 30), (0.2, 3 << 30), (0.3, None)):
        wake_times.remember(settings(tmp_path), seconds, Rest(0.03, held))
    assert planned.wakes(tmp_path, model="m") == ((0.1, 0.2, 0.3), 3.0)


def test_lines_of_another_version_are_skipped(tmp_path):
    (tmp_path / wake_times.FILE).write_text('{"engine": "vllm"}\n{"engine": "vllm", "model": "m", "seconds": "x"}\n')
    assert wake_times.seconds_of(settings(tmp_path)) == []
