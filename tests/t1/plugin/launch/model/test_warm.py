"""`quickthaw warm`: snapshot and model come to a node before they are needed, at a rate, whatever interrupts it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoint.snapshot.library import Library
from tests.kits.hub_kit import Hub
from tests.kits.launch_rig import REPO

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.xdist_group("launch")]
LIMIT_S = 60


def words(rig):
    """The launch's own words, with which the snapshot was taken."""
    return (
        "--engine-python",
        rig.python,
        rig.engine,
        "--model-path",
        rig.model,
        "--host",
        "127.0.0.1",
        "--port",
        "8000",
    )


def warm(rig, *options, names=None, prefix=(), **env):
    return rig.cli("warm", "--json", *options, *(names or words(rig)), prefix=prefix, **env)


def said(done):
    """What it prints, of one that ended well."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def store(launch_rig, tmp_path):
    """A store with the snapshot of a launch; the rig's host has neither."""
    launch_rig.answer = launch_rig.take()
    launch_rig.taken = launch_rig.name
    assert launch_rig.cli("snapshot", "push", launch_rig.taken, tmp_path / "store").returncode == 0
    launch_rig.fresh_home("node")
    return tmp_path / "store"


def other_processor(tmp_path):
    """A prefix for a host whose processor lacks a feature that the snapshot needs."""
    info = re.sub(r" sse4_2\b", "", Path("/proc/cpuinfo").read_text())
    (tmp_path / "cpuinfo").write_text(info)
    return ["unshare", "--mount", "sh", "-c", f'mount --bind {tmp_path}/cpuinfo /proc/cpuinfo && exec "$@"', "sh"]


def test_a_launch_restores_what_was_warmed_without_its_store(launch_rig, store):
    first = said(warm(launch_rig, "--snapshot-store", store))
    assert (first["snapshots"], first["models"]) == ([launch_rig.taken], [str(launch_rig.model)])
    assert first["fetched_bytes"] > 1 << 20 and first["failed"] == []
    again = said(warm(launch_rig, "--snapshot-store", store))
    assert again == {**first, "fetched_bytes": 0}
    shutil.rmtree(store)
    assert said(warm(launch_rig, "--snapshot-store", store)) == again
    with launch_rig.running() as started:
        assert started.ask() == launch_rig.answer
        assert started.phases()[0][:2] == ["mounting", "restoring"], started.ours()


def test_by_its_name(launch_rig, store):
    done = said(warm(launch_rig, "--snapshot-store", store, names=[launch_rig.taken]))
    assert done["snapshots"] == [launch_rig.taken] == Library(launch_rig.home).names()
    missing = warm(launch_rig, "--snapshot-store", store, names=["vllm-nothing-0123456789"])
    assert missing.returncode == 1 and missing.stderr.count("\n") == 3, missing.stderr
    assert (
        "nothing-warmed" in missing.stderr
        and f"no snapshot named 'vllm-nothing-0123456789' in file://{store}" in missing.stderr
    )


def test_a_model_of_a_store_comes_as_chunks(launch_rig, tmp_path):
    weights = tmp_path / "weights"
    assert launch_rig.cli("weights", "import", launch_rig.model, "--store", weights, "--tag", "m:v1").returncode == 0
    launch_rig.fresh_home("node")
    done = said(warm(launch_rig, "--store", weights, names=["m:v1"]))
    size = sum(path.stat().st_size for path in launch_rig.model.rglob("*") if path.is_file())
    assert done["models"] == ["m:v1"] and done["fetched_bytes"] == size
    assert said(warm(launch_rig, "--store", weights, names=["m:v1"]))["fetched_bytes"] == 0


def test_a_node_that_cannot_restore_it_says_why_and_warms_the_model_only(launch_rig, store, tmp_path):
    done = warm(launch_rig, "--snapshot-store", store, prefix=other_processor(tmp_path))
    found = said(done)
    assert found["snapshots"] == [] and found["models"] == [str(launch_rig.model)]
    assert found["failed"] == ["cpu-features-missing: sse4_2"]
    assert len([line for line in done.stderr.splitlines() if "cpu-features-missing: sse4_2" in line]) == 1
    assert not list((launch_rig.home / "snapshots").glob("*-*"))  # not a byte of it was fetched
    by_name = warm(launch_rig, "--snapshot-store", store, names=[launch_rig.taken], prefix=other_processor(tmp_path))
    assert by_name.returncode == 1 and "cpu-features-missing" in by_name.stderr and "nothing-warmed" in by_name.stderr


def test_a_store_without_it_or_that_fails_leaves_the_model(launch_rig, store):
    empty = warm(launch_rig, "--snapshot-store", store.parent / "empty")
    assert said(empty)["failed"] == ["archive-not-found"] and said(empty)["models"]
    silent = warm(launch_rig, "--snapshot-store", "http://127.0.0.1:1/store")
    assert len(said(silent)["failed"]) == 1 and said(silent)["models"]
    none = warm(launch_rig)
    assert said(none)["failed"] == ["no-snapshot-store"]


def test_a_full_disk_is_one_line_with_its_code(launch_rig, store):
    small = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size=1m none {launch_rig.home} && exec "$@"', "sh"]
    done = warm(launch_rig, "--snapshot-store", store, prefix=small)
    assert said(done)["failed"] == ["disk-full"] and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if "disk-full" in line]) == 1


def begun(rig, store, *options):
    argv = [sys.executable, "-m", "plugin", "warm", "--json", *options, "--snapshot-store", store, *words(rig)]
    return subprocess.Popen(
        list(map(str, argv)), env=rig.env(), cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def here(rig):
    """Bytes of what has come of a snapshot by now."""
    return sum(path.lstat().st_blocks * 512 for path in (rig.home / "snapshots").rglob("*") if path.is_file())


def wait_until(what):
    limit = time.monotonic() + LIMIT_S
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_it_keeps_to_its_rate_goes_on_where_it_was_killed_and_two_fetch_once(launch_rig, store):
    size = sum(path.stat().st_size for path in (store / "chunks").rglob("*") if path.is_file())
    rate = str(int(size / 4))  # four seconds' worth
    killed = begun(launch_rig, store, "--rate", rate)
    wait_until(lambda: here(launch_rig) > 0)
    began = time.monotonic()
    time.sleep(1.5)
    assert not Library(launch_rig.home).names(), "without a rate it takes a tenth of a second"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    kept = here(launch_rig)
    assert kept > 0
    both = [begun(launch_rig, store, "--rate", rate) for _ in range(2)]
    outs = [process.communicate(timeout=LIMIT_S) for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    assert time.monotonic() - began > 2.5
    found = sorted((json.loads(out) for out, _ in outs), key=lambda one: one["fetched_bytes"])
    assert found[0]["fetched_bytes"] == 0 < found[1]["fetched_bytes"]
    assert [one["snapshots"] for one in found] == [[launch_rig.taken]] * 2
    whole = said(warm(launch_rig, "--snapshot-store", store))
    assert whole["fetched_bytes"] == 0 and launch_rig.cli("snapshot", "verify", launch_rig.taken).returncode == 0


def test_it_stays_and_brings_what_comes_later_and_ends_on_sigterm(launch_rig, store):
    later = store.with_name("later")
    staying = begun(launch_rig, later, "--every", "0.3s")
    try:
        assert json.loads(staying.stdout.readline())["snapshots"] == []
        os.rename(store, later)
        wait_until(lambda: json.loads(staying.stdout.readline())["snapshots"] == [launch_rig.taken])
        staying.send_signal(signal.SIGTERM)
        _, errors = staying.communicate(timeout=10)
    finally:
        staying.kill()
    assert staying.returncode == 143 and "Traceback" not in errors


@pytest.mark.parametrize("rate", ["fast", "200MB", "-1", "1e9"])
def test_a_rate_that_is_none_is_a_usage_error(launch_rig, rate):
    done = warm(launch_rig, "--rate", rate)
    assert done.returncode == 2 and done.stderr.startswith("quickthaw: usage: ") and done.stderr.count("\n") == 1


def test_of_a_model_of_the_hub_that_is_mounted_the_chunks_come(launch_rig, tmp_path):
    hub = Hub()
    hub.add("org/toy", launch_rig.model)
    size = sum(path.stat().st_size for path in launch_rig.model.iterdir())
    try:
        env = hub.environment(tmp_path / "hf")
        engine = ("--engine-python", launch_rig.python, launch_rig.engine, "--model-path", "hf://org/toy")
        first = said(warm(launch_rig, names=engine, **env))
        assert first["models"] == ["hf://org/toy"] and first["fetched_bytes"] == size and first["failed"] == []
        assert said(warm(launch_rig, names=engine, **env))["fetched_bytes"] == 0
        gone = warm(launch_rig, names=["hf://org/nothing"], **env)
        assert gone.returncode == 1 and "nothing-warmed" in gone.stderr and "Traceback" not in gone.stderr
    finally:
        hub.close()
