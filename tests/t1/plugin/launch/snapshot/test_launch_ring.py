"""Excluded weights come back through the ring, beside CRIU; whatever happens to it, the engine reads them itself.

CRIU, the sandbox and all of quickthaw are real; the engine is a double (tests/programs/engine_double).
"""

import json
import logging
import os
import threading
from pathlib import Path

import pytest

import launchers
from checkpoint.criu.binary import Criu
from checkpoint.cuda import checkpoint as cuda
from checkpoint.host_memory import Room
from checkpoint.sandbox.sandbox import Sandbox
from plugin.runtime.capabilities import Capabilities
from plugin.runtime.config import LaunchSettings, state_home
from plugin.runtime.phases import Phase, PhaseTracker
from plugin.runtime.replica import Replica
from plugin.runtime.steps.model_mount import Weights
from plugin.runtime.weight_ring import feed
from plugin.runtime.weight_ring.ring import Ring
from tests.kits.gpu_rig import answer as gpu_answer
from tests.kits.gpu_rig import gpu_rig
from tests.kits.launch_rig import WEIGHT_BYTES

__all__ = ["gpu_rig"]
pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch"), pytest.mark.slow]
TAKEN = "weights: 0.00 GB taken"
OWN = "the engine read its weights itself"


def restored(started):
    return started.phases()[0][-1] == "verifying" and "restoring" in started.phases()[0]


@pytest.fixture(params=["sglang", "vllm"])
def rig(launch_rig, request):
    launch_rig.engine = request.param
    return launch_rig


def test_a_restore_takes_its_weights_from_the_ring(rig):
    answer = rig.take("--weights", "excluded")
    folder = rig.library.path(rig.name)
    layout = json.loads((folder / "weights" / "layout.json").read_text())
    assert layout["total"] == WEIGHT_BYTES and layout["own"] == 0
    assert "weights/layout.json" in rig.library.load(rig.name).files
    for _ in range(2):
        with rig.running("--weights", "excluded") as started:
            assert started.ask() == answer
            assert restored(started), started.text()
            assert TAKEN in started.ours()
            assert ["own_reload"] not in started.facts()["worker"]["calls"]


def test_two_replicas_have_a_ring_each(launch_rig):
    launch_rig.engine = "vllm"
    answer = launch_rig.take("--weights", "excluded")
    with launch_rig.running("--weights", "excluded", "--replicas", "2") as started:
        assert started.ask() == answer
        started.wait_serving()
        assert [started.ask() for _ in range(4)] == [answer] * 4
        assert started.ours().count(TAKEN) == 2 and OWN not in started.ours()


@pytest.fixture
def replica_of(launch_rig, monkeypatch):
    """Return a function that makes replicas of the double in this process."""
    for name, value in launch_rig.env().items():
        monkeypatch.setenv(name, value)
    made = []

    def make(engine, **settings):
        launcher = launchers.engine(engine)
        flag = "--model" if engine == "vllm" else "--model-path"
        environment = dict(os.environ)
        command = launcher.parse([flag, str(launch_rig.model)], environment)
        replica = Replica(
            LaunchSettings(
                engine=engine,
                command=command,
                engine_python=str(launch_rig.python),
                home=launch_rig.home,
                environment=environment,
                weights="excluded",
                **settings,
            ),
            launcher,
            Capabilities(),
            Criu.find(state_home()),
            Weights(str(launch_rig.model), launch_rig.home, None, True),
            PhaseTracker(),
            stdout=None,
            stderr=None,
        )
        made.append(replica)
        return replica

    yield make
    for replica in made:
        replica.stop(5.0)
        replica.weights.close()


def answer(replica):
    return replica.engine.generate(replica.running.client, "The quick brown fox", 4)


def own_reloads(replica):
    return replica.running.client.json("GET", "/facts")["worker"]["calls"].count(["own_reload"])


def unreadable(monkeypatch):
    def read(self, source, into, offset):
        raise OSError(5, "Input/output error", source.path)

    monkeypatch.setattr(Ring, "_read", read)
    return "weights-unreadable"


def late_error(monkeypatch):
    whole = Ring._fill

    def fill(self, number):
        if number == 5:
            raise OSError(5, "Input/output error", "model.safetensors")
        whole(self, number)

    monkeypatch.setattr(Ring, "_fill", fill)
    return "weights-unreadable: model.safetensors"


def stalled(monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(feed, "STALL_S", 0.3)
    monkeypatch.setattr(feed, "_STALLED", "weights-stalled: in a test")
    monkeypatch.setattr(Ring, "_fill", lambda self, number: released.wait(5.0))
    return "weights-stalled"


def gone(monkeypatch):
    monkeypatch.setattr(feed.WeightFeed, "_serve", lambda self, listener, ring: listener.accept()[0].close())
    return "weights-ring"


def another_layout(monkeypatch):
    load = feed.layouts.load
    monkeypatch.setattr(feed.layouts, "load", lambda folder: feed.layouts.Layout(load(folder).recorded, "another"))
    return "weights-differ"


@pytest.mark.parametrize("failure", [unreadable, late_error, stalled, gone, another_layout])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_engine_reads_its_weights_itself_where_the_ring_fails(replica_of, monkeypatch, caplog, engine, failure):
    cold = replica_of(engine)
    cold.start()
    expected = answer(cold)
    cold.stop(5.0)
    monkeypatch.setattr(feed, "SLOT_BYTES", 512 << 10)
    code = failure(monkeypatch)
    replica = replica_of(engine)
    with caplog.at_level(logging.INFO, "quickthaw"):
        replica.start()
    assert replica.restored and answer(replica) == expected
    assert f"{OWN}: {code}" in caplog.text and own_reloads(replica) == 1
    assert not replica.library.health(replica.snapshot.name).failures
    assert not (replica.running.restored.sandbox.control_dir / feed.SOCKET).exists()


def test_small_slots_carry_the_whole_stream(replica_of, monkeypatch, caplog):
    cold = replica_of("vllm")
    cold.start()
    expected = answer(cold)
    cold.stop(5.0)
    monkeypatch.setattr(feed, "SLOT_BYTES", 100_000)
    replica = replica_of("vllm")
    with caplog.at_level(logging.INFO, "quickthaw"):
        replica.start()
    assert replica.restored and answer(replica) == expected
    assert TAKEN in caplog.text and own_reloads(replica) == 0


def test_no_ring_where_memory_is_short(replica_of, monkeypatch, caplog):
    cold = replica_of("vllm")
    cold.start()
    expected = answer(cold)
    cold.stop(5.0)
    monkeypatch.setattr(feed, "room", lambda: Room(512 << 20, 1 << 30))
    replica = replica_of("vllm")
    with caplog.at_level(logging.INFO, "quickthaw"):
        replica.start()
    assert replica.restored and answer(replica) == expected
    assert "weights-memory-short" in caplog.text and own_reloads(replica) == 1


def test_bytes_that_answer_otherwise_are_read_again_and_the_ring_is_used_no_more(replica_of, monkeypatch, caplog):
    cold = replica_of("vllm")
    cold.start()
    expected = answer(cold)
    cold.stop(5.0)
    whole = Ring._fill

    def fill(self, number):
        whole(self, number)
        with self.view(number) as view:
            view[7] ^= 255

    monkeypatch.setattr(Ring, "_fill", fill)
    for _ in range(2):
        replica = replica_of("vllm")
        with caplog.at_level(logging.INFO, "quickthaw"):
            replica.start()
        assert replica.restored and replica.tracker.phase is Phase.SERVING and answer(replica) == expected
        assert own_reloads(replica) == 1
        replica.stop(5.0)
    assert caplog.text.count("weights-ring-differs") == 1
    assert not replica.library.health(replica.snapshot.name).failures


def until(monkeypatch, done):
    """Let the last of eight slots wait for an event: a restore that waited for the weights would not end."""
    whole = Ring._fill

    def fill(self, number):
        whole(self, number)
        if number == 7:
            assert done.wait(30.0)

    monkeypatch.setattr(feed, "SLOT_BYTES", WEIGHT_BYTES // 8)
    monkeypatch.setattr(Ring, "_fill", fill)


def after(monkeypatch, owner, name):
    """Return an event that is set once `owner.name` has been called."""
    done, original = threading.Event(), getattr(owner, name)

    def called(*arguments, **named):
        found = original(*arguments, **named)
        done.set()
        return found

    monkeypatch.setattr(owner, name, called)
    return done


def test_the_weights_are_read_while_criu_restores(replica_of, monkeypatch):
    cold = replica_of("vllm")
    cold.start()
    expected = answer(cold)
    cold.stop(5.0)
    until(monkeypatch, after(monkeypatch, Sandbox, "wait_criu"))
    replica = replica_of("vllm")
    replica.start()
    assert answer(replica) == expected and own_reloads(replica) == 0
    work = {one.name: one for one in replica.tracker.work}
    assert work["weights"].at_s < work["criu"].at_s and work["weights"].beside(work["criu"]) > 0.9 * work["criu"].took_s


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_on_a_gpu_the_weights_are_read_beside_criu_the_pages_and_the_driver(gpu_rig, monkeypatch, engine):
    cold = gpu_rig(engine, weights="excluded")
    cold.start()
    expected, before = gpu_answer(cold), own_reloads(cold)
    cold.standby()
    cold.start()
    assert cold.resting.continued and gpu_answer(cold) == expected and own_reloads(cold) == before
    assert "weights-ahead" in {one.name for one in cold.tracker.work}, "out of standby, too"
    cold.stop(5.0)
    until(monkeypatch, after(monkeypatch, cuda, "resume"))
    replica = gpu_rig(engine, weights="excluded")
    replica.start()
    assert replica.restored and gpu_answer(replica) == expected and own_reloads(replica) == 0
    work = {one.name: one for one in replica.tracker.work}
    (waking,) = [span for span in replica.tracker.timeline if span.phase is Phase.WAKING]
    assert work["weights"].at_s < work["criu"].at_s < work["fill"].at_s < work["cuda"].at_s < waking.at_s
    for part in ("criu", "fill", "cuda"):
        assert work["weights"].beside(work[part]) > 0.9 * work[part].took_s, (part, work)


def test_a_launch_killed_while_its_ring_fills_leaves_nothing(launch_rig):
    launch_rig.engine = "vllm"
    answer = launch_rig.take("--weights", "excluded")
    started = launch_rig.start("--weights", "excluded")
    started.wait_for("restoring")
    started.process.kill()
    started.process.wait(10)
    assert launch_rig.watch.gone() == set()
    with launch_rig.running("--weights", "excluded") as started:
        assert started.ask() == answer and TAKEN in started.ours()


def test_a_snapshot_from_a_store_brings_its_layout(launch_rig, tmp_path):
    launch_rig.engine = "vllm"
    answer = launch_rig.take("--weights", "excluded")
    store = ("--snapshot-store", str(tmp_path / "store"))
    assert launch_rig.cli("snapshot", "push", launch_rig.name, tmp_path / "store").returncode == 0
    launch_rig.fresh_home()
    for _ in range(2):
        with launch_rig.running("--weights", "excluded", *store) as started:
            assert started.ask() == answer
            assert restored(started), started.text()
            assert TAKEN in started.ours() and "itself" not in started.ours(), started.ours()


def test_a_model_in_a_store_is_read_through_its_mount(launch_rig, tmp_path):
    """Its chunks are verified there."""
    launch_rig.engine = "vllm"
    store = tmp_path / "weights"
    assert launch_rig.cli("weights", "import", launch_rig.model, "--store", store, "--tag", "m:v1").returncode == 0
    options = ("--weights", "excluded", "--store", str(store))
    answer = launch_rig.take(*options)
    with launch_rig.running(*options) as started:
        assert started.ask() == answer and restored(started)
        assert TAKEN in started.ours() and "itself" not in started.ours(), started.ours()
        mounts = Path("/proc/mounts").read_text()
        assert f"{launch_rig.home}/mounts/" in mounts
