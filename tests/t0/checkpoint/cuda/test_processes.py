"""Which memory the driver has put its state into: the difference of two lists of areas, and the file beside the images."""

from __future__ import annotations

import logging
import mmap
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.cuda.processes import AREAS_FILE, Areas, added, anonymous_areas, record, recorded
from checkpoint.errors import Integrity

pytestmark = pytest.mark.t0
pages = st.sets(st.integers(0, 30))


def areas_of(numbers: set[int]) -> Areas:
    """Return areas that cover these pages, one each."""
    return [(number, number + 1) for number in sorted(numbers)]


def joined(areas: Areas) -> Areas:
    found: Areas = []
    for start, end in areas:
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], end
        else:
            found.append((start, end))
    return found


@given(pages, pages)
def test_what_was_added_is_what_was_not_there(before: set[int], after: set[int]) -> None:
    for was, now in (
        (areas_of(before), areas_of(after)),
        (joined(areas_of(before)), joined(areas_of(after))),
        (areas_of(before), joined(areas_of(after))),
    ):
        assert joined(added(was, now)) == joined(areas_of(after - before))


def test_new_private_memory_is_found_and_shared_memory_is_not() -> None:
    before = anonymous_areas(os.getpid())
    with mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as private, mmap.mmap(-1, 9 << 20):
        gained = added(before, anonymous_areas(os.getpid()))
        assert sum(end - start for start, end in gained) in range(8 << 20, 16 << 20), (
            "others of the interpreter, too, but not the shared one"
        )
        del private
    assert anonymous_areas(2**22 - 1) == []


def test_the_processes_are_named_and_the_file_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pid = os.getpid()
    with caplog.at_level(logging.INFO, "quickthaw"):
        record({pid: [(0, 3 << 20)], 2**22 - 1: []}, {pid: 1014, 2**22 - 1: 1001}, tmp_path, "one")
    name = Path("/proc/self/comm").read_text().strip()
    assert caplog.messages == [f"snapshot one: GPU state of {name} (1014) 3 MiB, gone (1001) 0 MiB"]
    assert recorded(tmp_path) == {"1014": [(0, 3 << 20)], "1001": []}
    (tmp_path / AREAS_FILE).write_text("[]")
    with pytest.raises(Integrity, match="image-garbled"):
        recorded(tmp_path)
    (tmp_path / AREAS_FILE).unlink()
    record({}, {}, tmp_path, "two")
    assert recorded(tmp_path) == {} and not (tmp_path / AREAS_FILE).exists()
