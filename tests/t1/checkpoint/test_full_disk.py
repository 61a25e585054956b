"""A full or read-only disk: whatever the library, an archive or a restore writes, the failure is one line with a code and nothing else."""

import errno
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from checkpoint import disk
from checkpoint.criu.binary import Criu
from checkpoint.errors import Failed
from checkpoint.lazy_pages.residency import ResidencyBitmap
from checkpoint.snapshot import digests, speculative
from checkpoint.snapshot.library import Library
from checkpoint.store.archive import open_chunks, pull, push
from plugin.runtime.steps.compile_cache import CompileCache

pytestmark = pytest.mark.t1
REPO = Path(__file__).parents[3]


@pytest.fixture
def home(tmp_path):
    """Return a state folder of 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "small", folder], check=True, timeout=10)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True, timeout=10)


def fill(folder):
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (1 << 16, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC


def make_read_only(folder):
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True, timeout=10)


REFUSED = pytest.mark.parametrize(("refuse", "code"), [(fill, "disk-full"), (make_read_only, "disk-read-only")])


def snapshot(library):
    with library.writing("snap") as folder:
        for name in ("images", "shm", "tmp"):
            (folder / name).mkdir()
        (folder / "images/core-1.img").write_bytes(os.urandom(300_000))
        files = {name: msgspec.to_builtins(file) for name, file in digests.digest_folder(folder).items()}
        (folder / "manifest.json").write_bytes(msgspec.json.encode({"format": 1, "name": "snap", "files": files}))
    return library.path("snap")


@contextmanager
def refused(code):
    with pytest.raises(Failed) as caught:
        yield
    assert caught.value.code == code and "\n" not in str(caught.value)


@REFUSED
def test_a_library_reports_a_full_disk_and_keeps_working(home, caplog, refuse, code):
    library = Library(home)
    folder = snapshot(library)
    library.record_failure("snap", "criu-restore-failed")
    (folder / digests.LEDGER).unlink()
    refuse(home)
    caplog.clear()
    assert library.record_failure("snap", "again").failures == 2
    files = {"images/core-1.img": digests.digest_folder(folder)["images/core-1.img"]}
    digests.verify(folder, files)
    with library.in_use("snap"):
        pass
    with refused(code), library.writing("other") as new:
        (new / "images").mkdir()
        (new / "images/pages-1.img").write_bytes(bytes(10_000))
    assert library.names() == ["snap"]
    assert all(line.message.startswith(f"{code}: ") and "\n" not in line.message for line in caplog.records)
    assert len(caplog.records) >= 3
    library.sweep()
    if code == "disk-read-only":
        library.clear_failures("snap")
        with refused(code):
            library.remove("snap")
    else:
        library.remove("snap")  # which frees space
        assert library.names() == []


def test_missing_files_are_not_reported(home, caplog):
    make_read_only(home)
    Library(home).clear_failures("snap")
    assert caplog.records == []


@REFUSED
def test_an_archive_that_does_not_fit_is_refused(home, tmp_path, refuse, code):
    chunks = open_chunks(f"file://{tmp_path}/store")
    push(snapshot(Library(tmp_path)), chunks)
    refuse(home)
    with refused(code):
        pull("snap", chunks, Library(home).path("snap"))
    assert Library(home).names() == []


@REFUSED
def test_a_restores_caches_on_a_full_disk(home, caplog, monkeypatch, refuse, code):
    (home / "run").mkdir()
    refuse(home)
    program = home.parent / "criu"
    program.write_text("#!/bin/sh\necho Version: 4.2.1\n")
    program.chmod(0o755)
    assert Criu(program).cached_version(home) == "4.2.1"
    monkeypatch.setattr(speculative, "_plan_file", home / "run" / "next-1.json")
    speculative.save_plan({})
    assert [line.message.partition(":")[0] for line in caplog.records] == [code]


@REFUSED
def test_compiled_code_that_does_not_fit_is_refused(home, tmp_path, caplog, refuse, code):
    source = tmp_path / "compile" / "vllm"
    source.mkdir(parents=True)
    (source / "code.so").write_bytes(os.urandom(300_000))
    store = f"file://{tmp_path}/store"
    CompileCache(source, store, "compile-x").push_later().join(20)
    (home / "compile").mkdir()
    refuse(home)
    CompileCache(home / "compile" / "vllm", store, "compile-x").pull()
    (line,) = [line.message for line in caplog.records if line.levelname == "WARNING"]
    assert line.startswith(f"compile cache not pulled: {code}: ") and "\n" not in line
    assert not list((home / "compile").rglob("code.so"))


def test_a_residency_bitmap_is_fully_allocated_or_not_made(home):
    """A sparse one would end this process by SIGBUS when a page is marked, long after it was made."""
    fill(home)
    with (home / "filler").open("rb+") as file:
        file.truncate((home / "filler").stat().st_size - 16384)
    with pytest.raises(OSError) as caught:
        ResidencyBitmap.make(str(home / "map"), {"images/pages-1.img": 4096 * 100_000})
    assert caught.value.errno == errno.ENOSPC


def test_a_residency_bitmap_can_be_marked_on_a_full_disk(home):
    script = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from checkpoint.lazy_pages.residency import ResidencyBitmap
made = ResidencyBitmap.make(sys.argv[1] + "/map", {"images/pages-1.img": 4096 * 100_000})
try:
    Path(sys.argv[1], "filler").write_bytes(bytes(2 << 20))
except OSError:
    made.mark("images/pages-1.img", 0, 4096 * 100_000)
    print(ResidencyBitmap.open(sys.argv[1] + "/map").has("images/pages-1.img", 0, 4096 * 100_000))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, home, REPO], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "disk-full"),
        (errno.EDQUOT, "disk-full"),
        (errno.EROFS, "disk-read-only"),
        (errno.EIO, "it-failed"),
    ],
)
def test_every_disk_error_has_a_code(number, code):
    with refused(code), disk.required("nothing is written", "it-failed"):
        raise OSError(number, os.strerror(number), "/state/file")
