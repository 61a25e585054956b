"""Which GPU each replica of a launch is given."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import launchers
from checkpoint.compatibility.gpu import Gpu
from checkpoint.errors import HostLacks
from plugin.runtime.config import LaunchSettings
from plugin.runtime.gpu import placement
from plugin.runtime.gpu.placement import settings_by_replica

pytestmark = pytest.mark.t0
GPUS = tuple(Gpu("H100", 80 << 30, f"GPU-{letter}") for letter in "ab")


@pytest.fixture
def visible(monkeypatch, tmp_path):
    """Return a function that gives the GPU of each replica; it takes the launch's arguments and environment."""

    def all_of(environment):
        assert "CUDA_VISIBLE_DEVICES" not in environment, "its words name GPUs of the host"
        return GPUS, "580.159.03"

    monkeypatch.setattr(placement, "gpu_facts", all_of)

    def ask(*arguments, replicas=2, engine="vllm", **environment):
        command = launchers.engine(engine).parse(["--model", str(tmp_path), *arguments], environment)
        settings = LaunchSettings(engine, command, "python3", Path("/h"), replicas=replicas, environment=environment)
        found = settings_by_replica(settings)
        assert all(
            {k: v for k, v in s.environment.items() if k != "CUDA_VISIBLE_DEVICES"}
            == {k: v for k, v in environment.items() if k != "CUDA_VISIBLE_DEVICES"}
            for s in found
        )
        return [s.environment.get("CUDA_VISIBLE_DEVICES") for s in found]

    return ask


def test_each_replica_has_its_own_gpu(visible, caplog):
    assert visible(HOME="/root") == ["0", "1"]
    assert visible(CUDA_VISIBLE_DEVICES="GPU-b,GPU-a") == ["GPU-b", "GPU-a"]
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "quickthaw"):
        assert visible(replicas=3, engine="sglang") == ["0", "1", "0"]
    assert "replicas-share-gpu: 3 replicas on 2 GPUs;" in caplog.text and "--mem-fraction-static" in caplog.text


def test_an_engine_that_uses_several_gpus_sees_all(visible, tmp_path, caplog):
    assert visible("--tensor-parallel-size", "2") == [None, None]
    assert visible("-tp", "2") == [None, None]
    assert visible("--tp=2", engine="sglang") == [None, None]
    file = tmp_path / "config.yaml"
    file.write_text("tensor-parallel-size: 2\n")
    assert visible("--config", str(file), replicas=3, CUDA_VISIBLE_DEVICES="0,1") == ["0,1"] * 3
    assert visible("--tensor-parallel-size", "1") == ["0", "1"] and not caplog.records


def test_without_nvml_nothing_is_chosen(visible, monkeypatch, caplog):
    def fails(environment):
        raise HostLacks("nvml-missing", "no libnvidia-ml.so.1")

    monkeypatch.setattr(placement, "gpu_facts", fails)
    with caplog.at_level(logging.INFO, "quickthaw"):
        assert visible() == [None, None]
    assert "nvml-missing" in caplog.text
    assert visible(replicas=1) == [None]
