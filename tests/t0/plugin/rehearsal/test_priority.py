"""The control groups of rehearsals."""

import os

import pytest

from plugin.rehearsal import priority

pytestmark = pytest.mark.t0


def test_the_group_of_another_rehearsal_that_begins_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(priority, "_parents", lambda: iter([tmp_path]))
    own, ended, beginning, other = (
        tmp_path / name
        for name in (
            f"quickthaw-rehearsal-{os.getpid()}",
            "quickthaw-rehearsal-4194303",
            f"quickthaw-rehearsal-{os.getppid()}",
            "other",
        )
    )
    for group in (own, ended, beginning, other):
        group.mkdir()
    priority.remove_groups()
    assert sorted(tmp_path.iterdir()) == sorted([beginning, other])
