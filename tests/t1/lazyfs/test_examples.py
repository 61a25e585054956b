"""The examples run and work as described."""

from __future__ import annotations

import importlib.util

import pytest

from lazyfs.mount import kernel
from tests.kits.lazyfs.rig import ROOT, write_model

pytestmark = [
    pytest.mark.t1,
    pytest.mark.skipif(not kernel.may_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_weights_example(tmp_path, monkeypatch):
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path / "home"))
    model = write_model(tmp_path / "model", [5 << 20])
    status = load("lazyfs_weights").run(model, tmp_path / "mnt")
    assert status["counters"]["opens"] >= 4 and status["counters"]["failed"] == 0
    assert kernel.mount_at(str(tmp_path / "mnt")) is None


def test_the_blobs_example(tmp_path):
    model = write_model(tmp_path / "model", [5 << 20])
    load("lazyfs_blobs").run(model, str(tmp_path / "store"))
    assert (tmp_path / "model.copy" / "config.json").read_text() == (model / "config.json").read_text()
