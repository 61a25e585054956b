"""What `quickthaw doctor` says about a host's GPUs, with NVML doubled."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from click.testing import CliRunner

from checkpoint import host_memory
from checkpoint.host_memory import Room
from plugin import doctor
from plugin.doctor import Finding
from plugin.setup import gpu_host
from tests.kits.checkpoint import nvml_double
from tests.kits.checkpoint.nvml_double import Nvml

pytestmark = pytest.mark.t0
WHOLE = {"nvmlDeviceGetMigMode": [0, None], "nvmlDeviceGetPersistenceMode": [1, 1]}


@pytest.fixture
def host(monkeypatch, tmp_path):
    """Return a function that gives the lines of a host, by their name; nothing limits this one."""
    for name in ("nvidiactl", "nvidia0", "nvidia1"):
        (tmp_path / name).touch()
    monkeypatch.setattr(gpu_host, "CONTROL", tmp_path / "nvidiactl")
    monkeypatch.setattr(gpu_host, "MPS_PIPES", str(tmp_path / "mps"))
    monkeypatch.setattr(gpu_host, "HOST_PID_NAMESPACE", (gpu_host.Path("/proc/self/ns/pid")).stat().st_ino)
    monkeypatch.setattr(gpu_host, "find_spec", lambda name: object())
    monkeypatch.setattr(host_memory, "room", lambda: Room(400 << 30, 500 << 30))

    def ask(fails="", driver="580.159.03", environment=None, **modes):
        nvml = Nvml(fails, driver, **{**WHOLE, **modes})
        nvml_double.install(monkeypatch, lambda _: nvml)
        found = gpu_host.lines(environment or {})
        assert nvml.calls[0] == "nvmlInitWithFlags" and ("nvmlShutdown" in nvml.calls or fails == "nvmlInitWithFlags")
        assert all(line.remedy and "\n" not in line.detail + line.remedy for line in found[1:])
        return {line.what: line for line in found}

    ask.folder = tmp_path
    return ask


def test_a_host_that_limits_nothing_has_one_line(host):
    (line,) = host().values()
    assert (line.state, line.detail) == ("ok", "H100; H100, driver 580.159.03")


def test_a_driver_without_the_checkpoint_calls_is_off(host):
    assert host(driver="565.57.01")["gpu"].state == "off"
    assert host(fails="nvmlInitWithFlags")["gpu"].state == "off"
    assert "NVML" in host(fails="nvmlDeviceGetCount_v2")["gpu"].detail


def test_a_driver_that_hangs_hosts_is_named(host):
    line = host(driver="595.71.05")["gpu driver"]
    assert line.state == "note" and "#53" in line.detail and "595" in line.remedy
    assert "gpu driver" not in host(driver="610.57.04")


@pytest.mark.parametrize(("modes", "state"), [([1, 0], "note"), ([1, 1], "off")])
def test_slices_are_named_by_gpu(host, modes, state):
    line = host(nvmlDeviceGetMigMode=modes)["gpu slices (MIG)"]
    assert line.state == state and line.administrator and "-mig 0" in line.remedy
    assert ("CUDA_VISIBLE_DEVICES" in line.remedy) == (state == "note")


def test_the_multi_process_service_is_named(host):
    assert "gpu sharing (MPS)" not in host()
    pipes = host.folder / "pipes"
    pipes.mkdir()
    (pipes / "control").touch()
    line = host(environment={"CUDA_MPS_PIPE_DIRECTORY": str(pipes)})["gpu sharing (MPS)"]
    assert line.state == "note" and str(pipes) in line.detail and "CUDA_MPS_PIPE_DIRECTORY" in line.remedy
    (host.folder / "mps").mkdir()
    (host.folder / "mps" / "control").touch()
    assert "gpu sharing (MPS)" in host()


def test_a_container_that_refuses_a_gpus_file_is_off(host):
    (host.folder / "nvidia1").unlink()
    line = host()["gpu device"]
    assert line.state == "off" and "GPU 1" in line.detail and "nvidia1: No such file" in line.detail


def test_a_pid_namespace_of_a_container_is_named(host, monkeypatch):
    monkeypatch.setattr(gpu_host, "HOST_PID_NAMESPACE", 1)
    line = host()["gpu processes"]
    assert line.state == "note" and "--pid=host" in line.remedy


def test_a_control_group_smaller_than_a_gpu_is_named(host, monkeypatch):
    monkeypatch.setattr(host_memory, "room", lambda: Room(30 << 30, 64 << 30))
    line = host()["gpu host memory"]
    assert line.state == "note" and "69 GB" in line.detail and "86 GB" in line.detail and "excluded" in line.remedy

    def silent():
        raise ValueError("no MemAvailable")

    monkeypatch.setattr(host_memory, "room", silent)
    assert "gpu host memory" not in host()


def test_persistence_that_is_off_is_named_by_gpu(host):
    line = host(nvmlDeviceGetPersistenceMode=[1, 0])["gpu persistence"]
    assert line.state == "note" and "GPU 1:" in line.detail and "nvidia-persistenced" in line.remedy
    assert "gpu persistence" not in host(nvmlDeviceGetPersistenceMode=[None, None])


def test_missing_bindings_are_off(host, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(gpu_host, "find_spec", missing)
    assert host()["gpu bindings"].state == "off" and "quickthaw[cuda]" in host()["gpu bindings"].remedy


def test_doctor_prints_each_line(host, monkeypatch):
    host(nvmlDeviceGetPersistenceMode=[0, 0], nvmlDeviceGetMigMode=[1, 1])
    expected = gpu_host.lines({})
    assert len(expected) == 4
    monkeypatch.setattr(doctor, "_findings", doctor._gpu)
    done = CliRunner().invoke(doctor.doctor, ["--json"], standalone_mode=False)
    assert done.return_value == 3
    found = [Finding(**line) for line in json.loads(done.output)]
    assert [asdict(line) for line in found] == [asdict(line) for line in expected]


def test_without_a_gpu_there_is_one_note(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_host, "CONTROL", tmp_path / "nvidiactl")
    assert [line.state for line in gpu_host.lines({})] == ["note"]
