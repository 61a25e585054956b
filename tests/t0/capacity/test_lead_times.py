"""Lead-time samples come from the benchmark's JSON and from the journal of starts by themselves."""

import json
from pathlib import Path

import pytest

from capacity.errors import InputError
from capacity.inputs import document, lead_times, load

pytestmark = pytest.mark.t0


def start(kind, seconds, model="m", engine="vllm", at="2026-01-01T00:00:00+00:00"):
    return json.dumps({"model": model, "engine": engine, "kind": kind, "seconds": seconds, "at": at})


def test_the_benchmark_report(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"engine": "vllm", "cold": {"runs_s": [97, 99.5]}, "restored": {"runs_s": [1.2]}}))
    assert lead_times.read(path) == {"cold": (97.0, 99.5), "restored": (1.2,)}
    assert lead_times.read(path, engine="vllm")["cold"] == (97.0, 99.5)
    with pytest.raises(InputError, match="of engine sglang; there are starts of a model .vllm."):
        lead_times.read(path, engine="sglang")


def test_the_journal_is_sorted_by_time_and_filtered(tmp_path):
    path = tmp_path / "lead-times.jsonl"
    lines = [
        start("restored", 2.0, at="2026-01-01T02:00:00+02:00"),
        start("restored", 1.0, at="2025-12-31T23:00:00+00:00"),
        start("cold", 90),
        start("cold", 50, model="other"),
        start("cold", 20, engine="sglang"),
    ]
    path.write_text("\n".join(lines) + "\n")
    assert lead_times.read(path, model="m", engine="vllm") == {"cold": (90.0,), "restored": (1.0, 2.0)}
    with pytest.raises(InputError, match="model nobody"):
        lead_times.read(path, model="nobody")


PLAN = """
pools: [{name: a, gpu: H100, gpus: 8, memory: 80, region: east, price: 24, boot: 0s}]
services: [{name: llama-8b, gpus: 1, rate: 2%s}]
demand: {forecast: {llama-8b: {0.5: [1], 0.9: [2]}}}
"""


def service(lead_time):
    return load.from_field(document.parse_text(PLAN % lead_time, "p"), Path("p")).services[0]


def snapshot(home, name, cold_s, model="/models/llama-8b", engine="vllm"):
    """As checkpoint/snapshot/manifest.py writes it."""
    from checkpoint.snapshot import manifest

    folder = home / "snapshots" / name
    folder.mkdir(parents=True)
    fields = dict.fromkeys(manifest.Snapshot.__struct_fields__, None)
    assert {"model", "engine", "cold_s"} <= fields.keys()
    fields |= {"format": manifest.FORMAT, "name": name, "model": model, "engine": engine, "cold_s": cold_s}
    (folder / manifest.FILE_NAME).write_text(json.dumps(fields))


def test_what_was_measured_on_this_host_is_found_without_being_named(tmp_path, monkeypatch):
    """A service with no lead time at all: the starts of the model it is called after, in the home."""
    from types import SimpleNamespace

    from plugin.records.lead_times import remember

    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path))
    for engine, kind, seconds in (("vllm", "cold", 97.0), ("vllm", "restored", 1.5), ("sglang", "restored", 0.7)):
        command = SimpleNamespace(model="/models/llama-8b")
        remember(SimpleNamespace(command=command, engine=engine, home=tmp_path), kind, seconds)
    assert (service("").cold, service("").restored) == ((97.0,), (1.5, 0.7))
    assert service(", lead_time: {model: /models/llama-8b, engine: vllm}").restored == (1.5,)
    assert service(", lead_time: {cold: 10s}").cold == (10.0,)
    for words in (", lead_time: {model: qwen}", ", lead_time: {engine: tgi}"):
        with pytest.raises(
            InputError, match=r"there are starts of llama-8b .sglang., llama-8b .vllm.; service llama-8b"
        ):
            service(words)


def test_a_snapshot_remembers_the_start_it_was_taken_from(tmp_path, monkeypatch):
    """It counts where the journal has no cold start of the model, and not twice where it has."""
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path))
    snapshot(tmp_path, "one", 88.0)
    snapshot(tmp_path, "two", 41.0, engine="sglang")
    snapshot(tmp_path, ".partial-three", 1.0)
    assert lead_times.read(tmp_path) == {"cold": (88.0, 41.0), "restored": ()}
    assert lead_times.read(tmp_path / "snapshots" / "one")["cold"] == (88.0,)
    with pytest.raises(InputError, match="has no restored start of llama-8b") as caught:
        service("")
    assert (caught.value.code, caught.value.line) == ("missing-field", 3)
    (tmp_path / "lead-times.jsonl").write_text(start("restored", 2.0, model="/models/llama-8b") + "\n")
    assert (service("").cold, service("").restored) == ((88.0, 41.0), (2.0,))
    assert service(", lead_time: {engine: vllm}").cold == (88.0,)
    with open(tmp_path / "lead-times.jsonl", "a") as file:
        file.write(start("cold", 90.0, model="/models/llama-8b") + "\n")
    assert service("").cold == (90.0,)


def test_standby_is_as_the_file_says_and_the_rest_as_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path))
    times = ", lead_time: {cold: 9s, restored: 1s}, standby: "
    with pytest.raises(InputError, match="write wake and memory here, or measure them"):
        service(times + "{wake: 3s}")
    assert (service(times + "{wake: 3s, memory: 5GiB}").standby_memory) == 5.0
    wake = {"model": "llama-8b", "engine": "vllm", "seconds": 0.4, "memory_bytes": 70 * 2**30}
    (tmp_path / "wake-times.jsonl").write_text(json.dumps(wake) + "\n")
    found = [service(times + given) for given in ("{}", "{wake: 3s}", "{memory: 5GiB}", "{wake: 3s, memory: 5GiB}")]
    assert [(s.standby, s.standby_memory) for s in found] == [
        ((0.4,), 70.0),
        ((3.0,), 70.0),
        ((0.4,), 5.0),
        ((3.0,), 5.0),
    ]


def test_nothing_measured_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path / "none"))
    with pytest.raises(InputError, match="quickthaw bench coldstart") as caught:
        service("")
    assert caught.value.line == 3


def test_a_line_cut_off_at_the_end_is_left_out_and_any_other_is_an_error(tmp_path):
    path = tmp_path / "lead-times.jsonl"
    path.write_text(start("cold", 90) + "\n" + start("cold", 91)[:20])
    assert lead_times.read(path)["cold"] == (90.0,)
    path.write_text(start("cold", 90)[:20] + "\n" + start("cold", 91) + "\n")
    with pytest.raises(InputError, match=":1:"):
        lead_times.read(path)


@pytest.mark.parametrize("seconds", [-1, float("nan"), "1", True, None])
def test_bad_samples(tmp_path, seconds):
    path = tmp_path / "lead-times.jsonl"
    path.write_text(start("cold", 1) + "\n" + start("cold", seconds) + "\n")
    with pytest.raises(InputError) as caught:
        lead_times.read(path)
    assert (caught.value.code, caught.value.line) == ("bad-sample", 2)


def test_only_the_newest_count(tmp_path):
    path = tmp_path / "lead-times.jsonl"
    many = [start("cold", i, at=f"2026-01-01T{i // 60:02d}:{i % 60:02d}:00+00:00") for i in range(300)]
    path.write_text("\n".join(many) + "\n")
    cold = lead_times.read(path)["cold"]
    assert len(cold) == lead_times.NEWEST
    assert cold[-1] == 299


def test_a_plan_reads_them_and_what_the_file_says_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path))
    (tmp_path / "lead-times.jsonl").write_text(start("cold", 90) + "\n" + start("restored", 1.5) + "\n")
    text = """
pools: [{name: a, gpu: H100, gpus: 8, memory: 80, region: east, price: 24, boot: 0s}]
services: [{name: s, gpus: 1, rate: 2, lead_time: {from: $QUICKTHAW_HOME/lead-times.jsonl, model: m%s}}]
demand: {forecast: {s: {0.5: [1], 0.9: [2]}}}
"""
    read = load.from_field(document.parse_text(text % "", "p"), Path("p"))
    assert (read.services[0].cold, read.services[0].restored) == ((90.0,), (1.5,))
    read = load.from_field(document.parse_text(text % ", cold: 10s", "p"), Path("p"))
    assert (read.services[0].cold, read.services[0].restored) == ((10.0,), (1.5,))
    (tmp_path / "lead-times.jsonl").unlink()
    with pytest.raises(InputError) as caught:
        load.from_field(document.parse_text(text % "", "p"), Path("p"))
    assert caught.value.code == "unreadable"
