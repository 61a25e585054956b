"""What is read from a store before a command has understood its own arguments."""

from __future__ import annotations

from pathlib import Path

import pytest

from plugin import ahead

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
        ([], {"QUICKTHAW_SNAPSHOT_STORE": URL}, None),
    ],
)
def test_what_the_arguments_name(argv: list[str], environment: dict[str, str], found: tuple[str, str] | None) -> None:
    assert ahead.named(argv, environment) == found


def test_only_what_was_asked_for_is_handed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path / "home"))
    (tmp_path / "store").mkdir()
    store = f"file://{tmp_path / 'store'}"
    for asked in ((store, "snap-1"), (store, "snap-2"), ("file:///other", "snap-1")):
        ahead.start(["snap-1", "--snapshot-store", store])
        assert ahead.take(*asked) is None  # the store has no such snapshot: whoever needs it hears so
        assert ahead.take(*asked) is None
