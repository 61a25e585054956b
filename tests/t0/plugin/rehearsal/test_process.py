"""The process that rehearses for a launch, without an engine."""

import errno
import io
import sys
import types

import msgspec
import pytest

from checkpoint.snapshot import manifest
from plugin.rehearsal import process as module
from plugin.rehearsal.process import Order, Report
from plugin.rehearsal.rehearse import Rehearsal
from tests.kits.checkpoint.snapshots import draft

pytestmark = pytest.mark.t0


def test_a_disk_that_is_full_at_the_mark_is_reported(tmp_path, monkeypatch):
    folder = tmp_path / "snapshots" / "one"
    folder.mkdir(parents=True)
    (folder / manifest.FILE_NAME).write_bytes(manifest.dump(draft("one", 1)))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Rehearsal, "_attempt", lambda *_: ["short"])
    monkeypatch.setattr("checkpoint.snapshot.rehearsal.write", full)
    monkeypatch.setattr(module, "_obey", lambda *_: None)  # it ends the process with its standard input
    said = io.BytesIO()
    order = msgspec.json.encode(Order(home=str(tmp_path), name="one", lazy_restore=False)) + b"\n"
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(buffer=said))
    assert module._rehearse(io.BytesIO(order)) == 1
    report = msgspec.json.decode(said.getvalue(), type=Report)
    assert (report.event, report.code) == ("given-up", "disk-full")
