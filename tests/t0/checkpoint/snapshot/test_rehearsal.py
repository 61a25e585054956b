"""The mark of a rehearsed snapshot, and the lock of a rehearsal."""

import msgspec
import pytest

from checkpoint.errors import Busy, NotFound
from checkpoint.snapshot import manifest, rehearsal
from tests.kits.checkpoint.snapshots import draft

pytestmark = pytest.mark.t0


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / manifest.FILE_NAME).write_bytes(manifest.dump(draft("one", 1)))
    return tmp_path / "one"


def test_a_mark_is_of_one_manifest(folder):
    found = manifest.load(folder)
    assert rehearsal.read(folder, found) is None
    mark = rehearsal.Mark(found.digest, "2026-01-01T00:00:00Z", ["short"], 1.0)
    rehearsal.write(folder, mark)
    assert rehearsal.read(folder, found) == mark
    assert rehearsal.read(folder, msgspec.structs.replace(found, digest="0" * 64)) is None
    (folder / rehearsal.FILE_NAME).write_bytes(b"{")
    assert rehearsal.read(folder, found) is None


def test_a_push_is_noted_for_one_store_and_one_mark(folder):
    found = manifest.load(folder)
    assert not rehearsal.pushed(folder, "s3://a")
    rehearsal.write(folder, rehearsal.Mark(found.digest, "2026-01-01T00:00:00Z", [], 1.0))
    rehearsal.note_pushed(folder, "s3://a")
    assert rehearsal.pushed(folder, "s3://a") and not rehearsal.pushed(folder, "s3://b")
    rehearsal.write(folder, rehearsal.Mark(found.digest, "2026-01-02T00:00:00Z", [], 1.0))
    assert not rehearsal.pushed(folder, "s3://a")


def test_the_lock_is_for_one(folder, tmp_path):
    with rehearsal.lock(folder), pytest.raises(Busy, match="rehearsal-running"), rehearsal.lock(folder):
        pass
    with rehearsal.lock(folder):
        pass
    with pytest.raises(NotFound), rehearsal.lock(tmp_path / "none"):
        pass
