"""The control groups of rehearsals."""

import os

import pytest

from checkpoint.control_groups import Group
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


@pytest.mark.parametrize(
    ("place", "name", "text", "limited"),
    [
        ("", "cpu.max", "max 100000", False),
        ("pod", "cpu.max", "200000 100000", True),
        ("pod/engine", "cpu.max", "200000 100000", True),
        ("pod/engine", "cpu.cfs_quota_us", "-1", False),
        ("pod", "cpu.cfs_quota_us", "150000", True),
        ("other", "cpu.max", "200000 100000", False),
        ("pod", "cpu.max", "", False),
    ],
)
def test_a_limit_of_processor_time_is_found_in_the_group_and_above(tmp_path, monkeypatch, place, name, text, limited):
    (tmp_path / "pod/engine").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(priority, "_groups", lambda: iter([Group(tmp_path / "pod/engine", tmp_path)]))
    (tmp_path / place / name).write_text(text)
    assert priority.limited() is limited
