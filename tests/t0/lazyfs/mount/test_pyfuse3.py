"""The pyfuse3 transport answers reads from a mapping."""

import os

import pytest

from lazyfs.mount.open_files import Span
from lazyfs.mount.transports import pyfuse3

pytestmark = pytest.mark.t0


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(os.urandom(300_000))
    fd = os.open(path, os.O_RDONLY)
    yield fd, path.read_bytes()
    os.close(fd)


@pytest.mark.parametrize(("offset", "size"), [(0, 300_000), (4096, 131_072), (5000, 200_001), (299_999, 1)])
def test_a_mapping_holds_the_spans_bytes_at_any_offset(file, offset, size):
    fd, data = file
    assert pyfuse3._mapped(Span(fd, offset, size)) == data[offset : offset + size]


def test_an_unreadable_mapping_raises_so_that_the_read_is_copied(file, monkeypatch):
    monkeypatch.setattr(pyfuse3, "_MADV_POPULATE_READ", 9999)
    with pytest.raises(OSError, match="Invalid argument"):
        pyfuse3._mapped(Span(file[0], 0, 200_000))
