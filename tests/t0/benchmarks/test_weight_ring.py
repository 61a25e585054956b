"""The ring's benchmark reads every byte in each way, and refuses a model without weights."""

import pytest

from benchmarks import weight_ring

pytestmark = pytest.mark.t0


def test_each_way_is_measured(tmp_path, monkeypatch):
    for number in range(2):
        (tmp_path / f"{number}.safetensors").write_bytes(bytes(300_000 + number))
    monkeypatch.setattr(weight_ring, "SLOT_BYTES", 100_000)
    found = weight_ring.fill_rates(tmp_path, runs=2, threads=2)
    assert found.keys() == {"one", "threads", "ring"} and all(rate > 0 for rate in found.values())


def test_both_rings_are_read_to_their_end_from_a_cold_cache(tmp_path):
    (tmp_path / "0.safetensors").write_bytes(bytes(300_000))
    assert weight_ring.cold_seconds(tmp_path, 0.0, runs=1).keys() == {"ahead", "ring"}


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no safetensors"):
        weight_ring.fill_rates(tmp_path)
