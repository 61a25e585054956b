"""A pack holds exactly the extents of plans; the list of cold reads names every page once; damaged files are ignored."""

import ctypes
import errno
import os
import threading
import time

import pytest

from checkpoint.criu.pagemap import ProcessImage
from checkpoint.lazy_pages import cache, read_order, uffd
from checkpoint.lazy_pages.copy_plan import Plan
from checkpoint.lazy_pages.read_order import FILE_NAME, ColdReads, _beside, _present
from checkpoint.lazy_pages.readahead import Source
from checkpoint.lazy_pages.working_set import WorkingSet

pytestmark = pytest.mark.t0
PAGE, START, PAGES = 4096, 0x1000_0000, 64
DIGEST = b"digest"


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "pagemap-7.img").write_bytes(b"map")
    (images / "pages-1.img").write_bytes(b"".join(bytes([page]) * PAGE for page in range(PAGES)))
    return images


def image():
    """Return 40 lazy pages, 20 mapped and 4 eager ones; the file has this order."""
    found = ProcessImage(7, "pages-1.img")
    found.runs = [(START, START + 40 * PAGE, 0)]
    found.mapped = [(START + 40 * PAGE, START + 60 * PAGE, 40 * PAGE)]
    found.eager = [(START + 60 * PAGE, START + 64 * PAGE, 60 * PAGE)]
    return found


def made(source):
    plan = Plan()
    for batch, (page, count, zero) in enumerate([(30, 3, False), (2, 1, False), (50, 2, True), (10, 4, False)]):
        plan.add(START + page * PAGE, START + (page + count) * PAGE, source.address + page * PAGE, zero, batch)
    plan.seal()
    return {7: plan}


def kept(folder):
    source = Source(str(folder / "pages-1.img"))
    packed = cache.write_plans(
        str(folder), cache.fingerprints(str(folder)), DIGEST, made(source), {7: image()}, {"pages-1.img": source}
    )
    return source, packed


def read(folder, source):
    stamps = cache.fingerprints(str(folder))
    return cache.read_plans(str(folder), stamps, DIGEST, {7: image()}, {"pages-1.img": source}, 0)


def test_plans_with_a_pack_copy_the_same_bytes(folder):
    source, packed = kept(folder)
    assert packed and (folder.parent / cache.PACK).stat().st_size == 8 * PAGE
    found, pack_source = read(folder, source)
    plan = found[7]
    expected = made(source)[7]
    assert (plan.starts, plan.ends, plan.zero) == (expected.starts, expected.ends, expected.zero)
    for piece, nothing in enumerate(plan.zero):
        if not nothing:
            size = plan.ends[piece] - plan.starts[piece]
            assert 0 <= plan.source(piece) - pack_source.address < pack_source.size
            assert ctypes.string_at(plan.source(piece), size) == ctypes.string_at(expected.source(piece), size)


def test_a_replaced_or_missing_pack_is_not_copied_from(folder):
    source, _ = kept(folder)
    place = folder.parent / cache.PACK
    data = place.read_bytes()
    copy = place.with_name("copy")
    copy.write_bytes(data)
    copy.replace(place)
    assert read(folder, source) is None
    place.unlink()
    assert read(folder, source) is None


def test_without_room_for_a_pack_plans_copy_from_the_images(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    source, packed = kept(folder)
    assert not packed and sorted(path.name for path in folder.parent.iterdir()) == [cache.PLANS, "images"]
    found, none = read(folder, source)
    assert none is None and found[7].source(0) == source.address + 30 * PAGE


def list_of(folder, packed):
    working_set = WorkingSet([(7, START, START + 5 * PAGE), (7, START + 40 * PAGE, START + 45 * PAGE)], 2)
    working_set.digest = DIGEST
    used = {7: [(START + 58 * PAGE, START + 60 * PAGE, 58 * PAGE)]}
    ColdReads(str(folder)).write(working_set, {7: image()}, used, packed)


def test_listed_pages_are_read_once(folder):
    kept(folder)
    list_of(folder, True)
    files = [folder / "pages-1.img", folder.parent / cache.PACK]
    for file in files:
        with file.open("rb+") as open_file:
            os.fsync(open_file.fileno())
            os.posix_fadvise(open_file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    notified = threading.Event()
    reading = ColdReads(str(folder))
    reading.listen(notified.set)
    assert reading.working_set == DIGEST
    if reading.cold:  # tmpfs cannot drop its pages
        assert notified.wait(10) and reading.requested.is_set()
    # Eager and used pages, the pack, and mapped pages.
    assert reading.size == (4 + 2 + 8 + 5) * PAGE
    source = Source(str(files[1]))
    assert source.populate(0, source.size) == 0
    assert not ColdReads(str(folder)).cold or reading.cold


def test_without_a_pack_the_working_set_is_listed(folder):
    list_of(folder, False)
    assert ColdReads(str(folder)).size == (4 + 2 + 5 + 5) * PAGE


@pytest.mark.parametrize("kernel_knows", [True, False])
def test_mostly_used_blocks_are_read_completely_and_others_in_part(folder, monkeypatch, kernel_knows):
    if not kernel_knows:  # before 6.13

        def unknown(*_):
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr(os, "pidfd_open", unknown)
    block = (2 << 20) // PAGE
    large = folder / "pages-2.img"
    large.write_bytes(os.urandom(4 * block * PAGE - 3 * PAGE))  # not even at its end
    pages = 4 * block - 3
    process = ProcessImage(8, "pages-2.img")
    process.mapped = [(START, START + pages * PAGE, 0)]
    used = [(block + 7, block + 7 + block // 2), (3 * block + 9, pages), (2 * block + 40, 2 * block + 50)]
    working_set = WorkingSet([(8, START + first * PAGE, START + end * PAGE) for first, end in used], 3)
    working_set.digest = DIGEST
    ColdReads(str(folder)).write(working_set, {8: process}, {}, False)
    with large.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    reading = ColdReads(str(folder))
    if not reading.cold:
        pytest.skip("this file system keeps what it has cached")
    wanted = [*range(block, 2 * block), *range(2 * block + 40, 2 * block + 50), *range(3 * block, pages)]
    address, size = uffd.map_file(str(large))
    try:
        limit = time.monotonic() + 10
        found = []
        while found != wanted and time.monotonic() < limit:
            time.sleep(0.01)
            found = [page for page, there in enumerate(uffd.cached(address, size)) if there & 1]
        assert found == wanted
    finally:
        uffd.unmap(address, size)


def test_a_damaged_list_or_one_of_missing_files_is_ignored(folder):
    kept(folder)
    list_of(folder, True)
    place = folder.parent / FILE_NAME
    whole = place.read_bytes()
    place.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    assert ColdReads(str(folder)).working_set == b""
    place.write_bytes(whole)
    assert ColdReads(str(folder)).working_set == DIGEST
    (folder.parent / cache.PACK).unlink()
    gone = ColdReads(str(folder))
    assert gone.working_set == b"" and not gone.cold
    assert cache.read(str(folder), FILE_NAME, read_order._VERSION)


def test_present_pages_are_the_written_ones(tmp_path):
    memory = ctypes.create_string_buffer(8 * PAGE)
    start = -(-ctypes.addressof(memory) // PAGE) * PAGE
    libc = ctypes.CDLL(None)
    assert libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(6 * PAGE), 4) == 0  # MADV_DONTNEED
    for page in (1, 2, 5):
        ctypes.memset(start + page * PAGE, 1, 1)
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        assert _present(fd, start, start + 6 * PAGE) == [
            (start + PAGE, start + 3 * PAGE),
            (start + 5 * PAGE, start + 6 * PAGE),
        ]
    finally:
        os.close(fd)


def test_known_ranges_are_not_inspected():
    found = _beside(image(), [(START + 38 * PAGE, START + 42 * PAGE), (START + 50 * PAGE, START + 51 * PAGE)])
    assert found == [(START + 42 * PAGE, START + 50 * PAGE), (START + 51 * PAGE, START + 60 * PAGE)]
