"""`--weights auto`: included or excluded by measurements of this host, with the reason logged; and a mount lost under an engine."""

import json
import os
import signal

import pytest

import launchers
from lazyfs.api import find_mount
from lazyfs.mount import kernel
from plugin.records import restore_rates
from plugin.runtime.config import LaunchSettings
from plugin.runtime.steps import model_mount, take_snapshot

pytestmark = [pytest.mark.t1]
GB = 1_000_000_000


class Fake:
    """An engine that reloads its weights in a given time, on a clock that only it advances."""

    def __init__(self, monkeypatch, seconds, error=None):
        self.now, self.seconds, self.error, self.reloads = 100.0, seconds, error, 0
        monkeypatch.setattr(take_snapshot.time, "monotonic", lambda: self.now)

    def reload_weights(self, client, model):
        self.reloads += 1
        if self.error:
            raise self.error
        self.now += self.seconds


@pytest.fixture
def choose(tmp_path, monkeypatch, caplog):
    """Return the choice for weights of `size` bytes that the engine reloads in `seconds`, and the log."""

    def run(size, seconds, weights="auto", gpu=False, error=None):
        caplog.clear()
        caplog.set_level("INFO", "quickthaw")
        engine = Fake(monkeypatch, seconds, error)
        command = launchers.engine("vllm").parse(["--model", "/m"], {})
        settings = LaunchSettings("vllm", command, "/python", tmp_path, weights=weights)
        replica = type("R", (), {})()
        replica.settings, replica.engine = settings, engine
        replica.weights = type("W", (), {"size": size})()
        monkeypatch.setattr(take_snapshot, "_unsafe", lambda replica: "")
        return take_snapshot._excludes_weights(replica, None, gpu), caplog.text, engine.reloads

    run.home = tmp_path
    return run


def test_an_explicit_choice_is_kept(choose):
    assert choose(GB, 9.0, "excluded")[0] is True
    assert choose(GB, 0.0, "included")[0] is False


def test_a_fast_reload_excludes_the_weights_and_a_slow_one_includes_them(choose):
    for _ in range(3):
        restore_rates.remember(choose.home, 2 * GB, 2.0, gpu=False)  # 1 GB/s
    thin, said, _ = choose(10 * GB, 4.0)
    assert thin is True
    assert "weights excluded" in said and "10.00 s at 1.0 GB/s (3 restores here)" in said and "took 4.00 s" in said
    thin, said, _ = choose(10 * GB, 12.0)
    assert thin is False and "weights included" in said and "took 12.00 s" in said


def test_a_faster_restore_includes_the_weights(choose):
    restore_rates.remember(choose.home, 2 * GB, 2.0, gpu=False)
    assert choose(10 * GB, 5.0)[0] is True
    for _ in range(9):
        restore_rates.remember(choose.home, 4 * GB, 1.0, gpu=False)
    assert choose(10 * GB, 5.0)[0] is False


def test_small_weights_are_included_without_a_trial(choose):
    restore_rates.remember(choose.home, 2 * GB, 1.0, gpu=False)
    thin, said, reloads = choose(GB // 2, 0.0)
    assert (thin, reloads) == (False, 0) and "weights included" in said and "could not win much" in said
    assert choose(1 << 20, 0.0)[1:] == choose(1 << 20, 0.0)[1:] and choose(1 << 20, 0.0)[2] == 0


def test_restore_rates_of_a_gpu_are_separate(choose):
    restore_rates.remember(choose.home, 2 * GB, 0.1, gpu=False)
    restore_rates.remember(choose.home, 2 * GB, 2.0, gpu=True)
    assert choose(10 * GB, 2.0, gpu=True)[0] is True
    assert choose(10 * GB, 2.0, gpu=False)[0] is False


@pytest.mark.slow
def test_before_the_first_restore_the_host_is_probed(choose):
    thin, said, _ = choose(100 * GB, 0.01)
    assert thin is True and "a probe, no restore yet" in said
    assert 1e7 < restore_rates.probe(choose.home) < 1e12


def test_an_engine_that_cannot_reload_includes_its_weights(choose):
    from launchers.errors import EngineFailed

    restore_rates.remember(choose.home, 2 * GB, 2.0, gpu=False)
    thin, said, _ = choose(10 * GB, 0.0, error=EngineFailed("engine-refused", "no"))
    assert thin is False and "engine-refused" in said


def test_old_small_and_torn_records_are_ignored(tmp_path):
    assert restore_rates.measured(tmp_path, False) is None
    restore_rates.remember(tmp_path, 1 << 20, 0.001, gpu=False)
    assert restore_rates.measured(tmp_path, False) is None
    for index in range(60):
        restore_rates.remember(tmp_path, GB * (1 if index < 35 else 4), 1.0, gpu=False)
    with open(tmp_path / restore_rates.FILE, "ab") as file:
        file.write(b'{"bytes": 1, "sec\n')
    rate, count = restore_rates.measured(tmp_path, False)
    assert (rate, count) == (4 * GB, restore_rates.KEPT)
    assert json.loads((tmp_path / restore_rates.FILE).read_text().splitlines()[0])["gpu"] is False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_mount_lost_while_the_engine_reads_costs_another_start(launch_rig, number):
    started = launch_rig.start(env={"ENGINE_DOUBLE_COMPILE_S": "2"})
    started.wait_for("quickthaw: loading")
    (record,) = (launch_rig.home / "mounts").glob("*.json")
    os.kill(json.loads(record.read_text())["pid"], number)
    answer = started.ask()
    started.wait_serving()
    assert "weights-lost" in started.text()
    assert started.stop() == 143
    with launch_rig.running() as started:
        assert started.ask() == answer


@pytest.mark.skipif(not kernel.may_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN")
def test_the_mount_of_a_model_without_config_json_is_kept(tmp_path, monkeypatch):
    """Otherwise its daemon ends once the engine, asleep or slow to start, has no file of it open."""
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path / "home"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.gguf").write_bytes(b"GGUF" + bytes(9000))
    (tmp_path / "model" / "README.md").write_text("a model")
    weights = model_mount.Weights(str(tmp_path / "model"), tmp_path / "home", None, enabled=True)
    try:
        where = weights.mount()
        assert find_mount(where).status()["open_files"] == 1
        # An incomplete open file is not passed through, so it is not the large one.
        assert os.readlink(f"/proc/self/fd/{weights._lease}") == str(where / "README.md")
    finally:
        weights.close()
    assert find_mount(where) is None
