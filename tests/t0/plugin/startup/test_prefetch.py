"""What is read from a store before a command has understood its own arguments."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from checkpoint.errors import NotFound
from checkpoint.snapshot.library import Library
from checkpoint.store.remote_restore import Remote
from plugin.startup import prefetch as ahead

URL = "s3://bucket/models"


@pytest.mark.parametrize(
    ("argv", "environment", "found"),
    [
        (["snap-1", "--snapshot-store", URL], {}, (URL, "snap-1")),
        (["snap-1", "--port", "1", f"--snapshot-store={URL}"], {}, (URL, "snap-1")),
        (["snap-1"], {"QUICKTHAW_SNAPSHOT_STORE": URL}, (URL, "snap-1")),
        (["snap-1", "--snapshot-store", URL], {"QUICKTHAW_SNAPSHOT_STORE": "http://other"}, (URL, "snap-1")),
        (["snap-1"], {}, None),
        (["snap-1", "--snapshot-store"], {}, None),
        (
            ["--port", "1", "snap-1", "--snapshot-store", URL],
            {},
            None,
        ),  # which word is the name, only the command knows
        (["snap-1", "--snapshot-store", URL, "--trust-key", "k"], {}, None),  # a signature is judged first
        (["snap-1", "--snapshot-store", URL], {"QUICKTHAW_TRUST_KEYS": "k"}, None),
        (["snap-1", "--snapshot-store", URL], {"QUICKTHAW_TRUST_KEY": "k"}, None),
        (["snap-1", "--help"], {"QUICKTHAW_SNAPSHOT_STORE": URL}, None),
        ([], {"QUICKTHAW_SNAPSHOT_STORE": URL}, None),
    ],
)
def test_what_the_arguments_name(argv: list[str], environment: dict[str, str], found: tuple[str, str] | None) -> None:
    assert ahead.named(argv, environment) == found


def test_what_begins_is_what_the_command_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path / "home"))
    asked: list[tuple[str, str]] = []

    def open_(library: Library, url: str, name: str, *_: object) -> None:
        asked.append((url, name))
        raise NotFound("archive-not-found", name)

    monkeypatch.setattr(Remote, "open", open_)
    thread = ahead.start(["snap-1", "--snapshot-store", URL])
    assert thread is not None
    thread.join(10.0)
    assert not thread.is_alive() and asked == [(URL, "snap-1")]
    (tmp_path / "home/snapshots/snap-1").mkdir(parents=True)
    (tmp_path / "home/snapshots/snap-1/manifest.json").write_text("{}")
    thread = ahead.start(["snap-1", "--snapshot-store", URL])  # it is here: no store is asked
    assert thread is not None
    thread.join(10.0)
    assert len(asked) == 1


def test_a_store_that_does_not_answer_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(ahead, "HEAD_START_S", 0.01)
    answered = threading.Event()

    def open_(*_: object) -> None:
        answered.wait(30.0)
        raise NotFound("archive-not-found", "snap-1")

    monkeypatch.setattr(Remote, "open", open_)
    thread = ahead.start(["snap-1", "--snapshot-store", URL])
    assert thread is not None and thread.is_alive() and not answered.is_set()
    answered.set()
    thread.join(10.0)
    assert not thread.is_alive()
