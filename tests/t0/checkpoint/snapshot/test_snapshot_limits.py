"""Hang limits grow with the amount of work; a kernel with another page size is refused by name."""

import msgspec
import pytest

from checkpoint.errors import HostLacks
from checkpoint.snapshot.manifest import SnapshotFile
from checkpoint.snapshot.restore import check_page_size, limits
from tests.kits.checkpoint.snapshots import draft

pytestmark = pytest.mark.t0


def test_limits_grow_with_the_bytes_to_unpack_and_restore():
    small = draft("x", 1001)
    files = {"shm/weights": SnapshotFile(100 << 30, ""), "images/pages-1.img": SnapshotFile(1 << 40, "")}
    large = msgspec.structs.replace(small, files=files, image_bytes=1 << 40)
    assert limits(small) == (30.0, 600.0)
    unpack_s, restore_s = limits(large)
    assert 2000 < unpack_s < 3000 and restore_s > 20000


def test_another_page_size_is_refused():
    check_page_size()
    with pytest.raises(HostLacks, match="page-size.*65536 bytes"):
        check_page_size(65536)
