"""JSON-lines files of measurements, and atomic replacement of files."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from checkpoint.files import replacing
from plugin.records import jsonl

pytestmark = pytest.mark.t0


def test_the_latest_lines_are_returned_in_order(tmp_path: Path) -> None:
    file = tmp_path / "j"
    assert jsonl.latest(file, 3) == []
    for number in range(10):
        jsonl.append(file, {"n": number})
    assert [line["n"] for line in jsonl.latest(file, 3)] == [7, 8, 9]
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_file_stays_small_and_has_its_latest_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MOST_BYTES", 20_000)
    monkeypatch.setattr(jsonl, "KEPT", 20)
    file = tmp_path / "j"
    for number in range(400):
        jsonl.append(file, {"n": number, "model": "m" * 100})
        assert file.stat().st_size <= 20_000
    assert [line["n"] for line in jsonl.latest(file, 5)] == [395, 396, 397, 398, 399]
    assert file.stat().st_mode & 0o777 == 0o600


def test_torn_lines_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "j"
    file.write_bytes(b'": 1}\n{"n": 1}\n[]\n{"n"\n{"n": 2}\n')
    assert jsonl.latest(file, 9) == [{"n": 1}, {"n": 2}]


def test_a_line_that_cannot_be_written_is_logged_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "quickthaw"):
        jsonl.append(tmp_path / "none" / "j", {"n": 1})
    assert "not kept" in caplog.text


def test_threads_can_replace_the_same_file(tmp_path: Path) -> None:
    target, both = tmp_path / "file", threading.Barrier(2)
    failures: list[BaseException] = []

    def write(text: str) -> None:
        try:
            with replacing(target) as new:
                new.write_text(text)
                both.wait(10)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "two")]
    [thread.start() for thread in threads]
    [thread.join(20) for thread in threads]
    assert not failures and target.read_text() in ("one", "two")
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_replacement_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(ValueError, match="stop"), replacing(target) as new:
        new.write_text("half")
        raise ValueError("stop")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
