"""The bound of the cache: what it means, what counts, what goes first, and what others' writes take."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from lazyfs.admin.cache_report import prune, prune_target, report
from lazyfs.admin.records import unneeded
from lazyfs.cache import cache as cache_module
from lazyfs.cache.bound import AUTO, UNBOUNDED, VARIABLE, host_bound, kept_free, low_water, parse, set_host_bound, shown
from lazyfs.cache.cache import Cache
from lazyfs.cache.sparse_file import ABSENT
from lazyfs.cli.cache import cache as command
from lazyfs.content.manifest import decode
from lazyfs.content.stat_index import import_directory, read_through
from lazyfs.errors import DiskFull
from lazyfs.fetch.warm import warm
from lazyfs.mount.config import MountConfig
from lazyfs.mount.kernel import FSTYPE, MountEntry
from lazyfs.mount.manifest_source import load_manifest
from lazyfs.paths import private_dir
from tests.kits.lazyfs.models import make_model

pytestmark = [pytest.mark.t0, pytest.mark.usefixtures("home")]
MB, GB = 1 << 20, 1_000_000_000


@pytest.fixture(autouse=True)
def no_bound_of_the_host(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


class Disk:
    """A file system of 100 MB, on which the cache's files and `others` lie."""

    def __init__(self, monkeypatch, cache):
        self.others, self.cache, self.total = 0, cache, 100 * MB
        monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: self.usage())

    def usage(self):
        used = self.others + self.cache.usage()
        return SimpleNamespace(total=self.total, used=used, free=self.total - used)


def sparse_file(cache, name, size, age):
    folder = cache.folder(SimpleNamespace(digest=name * 32))
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(os.urandom(size))
    (folder / "lock").touch()
    os.utime(folder / "lock", (age, age))
    return folder


@pytest.mark.parametrize(
    ("total", "kept"), [(1000 * GB, 100 * GB), (252 * GB, 25.2 * GB), (100 * GB, 20 * GB), (40 * GB, 10 * GB), (0, 0)]
)
def test_a_tenth_and_at_least_20_gb_stay_free_but_of_a_small_disk_a_quarter(total, kept):
    assert kept_free(total) == kept
    assert low_water(total) == kept * 0.9


@pytest.mark.parametrize(
    ("text", "bound"), [("auto", AUTO), ("none", UNBOUNDED), ("0", 0), ("1.5", 1.5 * GB), ("1e-12", 1)]
)
def test_a_bound_is_read_and_shown(text, bound):
    assert parse(text) == bound
    assert parse(shown(bound)) == bound or bound == 1


@pytest.mark.parametrize("text", ["", "-1", "nan", "inf", "10GB", "full"])
def test_what_is_no_bound_is_refused(text):
    with pytest.raises(ValueError, match="cache limit"):
        parse(text)


def test_the_hosts_bound_is_the_variable_else_its_file_else_auto(tmp_path, monkeypatch):
    assert host_bound(tmp_path) == AUTO
    set_host_bound(tmp_path, 5 * GB)
    cache = Cache(tmp_path, AUTO)
    assert cache.bound == 5 * GB and Cache(tmp_path, 7).bound == 7 and Cache(tmp_path).bound == UNBOUNDED
    monkeypatch.setenv(VARIABLE, "none")
    assert cache.bound == UNBOUNDED
    monkeypatch.delenv(VARIABLE)
    (tmp_path / "limit").write_text("damaged")
    assert cache.bound == AUTO
    set_host_bound(tmp_path, AUTO)
    assert not (tmp_path / "limit").exists()


def test_auto_grants_what_leaves_a_quarter_of_a_small_disk_free_and_evicts_the_oldest(tmp_path, monkeypatch):
    cache = Cache(tmp_path, AUTO)
    disk = Disk(monkeypatch, cache)
    oldest, other = sparse_file(cache, "aa", 30 * MB, 100), sparse_file(cache, "bb", 30 * MB, 200)
    assert cache.reserve_room(8 * MB) and oldest.exists(), "15 MB are left above the quarter"
    cache.release_room(8 * MB)
    disk.others = 10 * MB
    assert cache.reserve_room(8 * MB)
    assert not oldest.exists() and other.exists()
    disk.others = 75 * MB
    assert not Cache(tmp_path, AUTO).reserve_room(1 * MB), "nothing is left to evict that would leave a quarter free"
    assert "leaves 0.0 free" in cache.why_full() and "give --cache-limit" in cache.why_full()


def test_room_granted_to_another_process_is_not_granted_twice(tmp_path, monkeypatch):
    one, two = Cache(tmp_path, AUTO), Cache(tmp_path, AUTO)
    Disk(monkeypatch, one)
    assert one.reserve_room(40 * MB) and two.reserve_room(30 * MB)
    assert not two.reserve_room(8 * MB)
    one.release_room(40 * MB)
    assert two.reserve_room(8 * MB)


def test_others_writes_evict_unused_files_below_the_low_water_mark_only(tmp_path, monkeypatch):
    cache = Cache(tmp_path, AUTO)
    disk = Disk(monkeypatch, cache)
    pinned, unused = sparse_file(cache, "aa", 20 * MB, 100), sparse_file(cache, "bb", 20 * MB, 200)
    cache.pin_files([pinned.name])
    disk.others = 37 * MB
    assert cache.watch() == 0, "23 MB are free: below the quarter, above nine tenths of it"
    disk.others = 40 * MB
    assert cache.watch() == 20 * MB and pinned.exists() and not unused.exists()
    disk.others = 79 * MB
    assert cache.watch() == 0 and pinned.exists(), "a living mount's file stays, however full the disk is"
    assert Cache(tmp_path, 1).watch() == 0, "a limit in bytes does not watch the disk"


def test_snapshots_compile_caches_quarantine_and_access_logs_count(home):
    cache = Cache(home / "cache", AUTO)
    for name in ("snapshots/x", "compile/vllm", "traces", "cache/quarantine", "store/chunks"):
        (home / name).mkdir(parents=True)
        (home / name / "file").write_bytes(bytes(MB))
    sparse_file(cache, "aa", 2 * MB, 100)
    assert cache.counted() == 6 * MB
    shares = {share.name: share.bytes for share in report(cache).shares if share.counts}
    expected = {"chunks": 2, "quarantine": 1, "snapshots": 1, "compile caches": 1, "access logs": 1}
    assert shares == {name: size * MB for name, size in expected.items()}
    limited = Cache(home / "cache", 16 * MB)
    assert limited.reserve_room(10 * MB) and not limited.reserve_room(4 * MB)


def test_a_pin_is_refused_if_even_evicting_makes_no_room(tmp_path, monkeypatch):
    cache = Cache(tmp_path, AUTO)
    disk = Disk(monkeypatch, cache)
    sparse_file(cache, "aa", 30 * MB, 100)
    disk.others = 20 * MB
    cache.need_room(55 * MB, 0)
    with pytest.raises(DiskFull, match="--cache-limit"):
        cache.need_room(56 * MB, 0)


def test_a_cache_that_cannot_be_looked_at_streams_and_says_why(tmp_path, monkeypatch):
    cache = Cache(tmp_path / "c", AUTO)

    def gone(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cache_module.shutil, "disk_usage", gone)
    assert not cache.reserve_room(1)
    assert "Permission denied" in cache.why_full()


def run(*words, code=0):
    result = CliRunner().invoke(command, words)
    assert result.exit_code == code, result.output
    return result.output


def cached(home, name, size, age):
    return sparse_file(Cache(home / "cache"), name, size, age)


def test_limit_is_printed_set_and_heeded_at_once(home):
    old, new = cached(home, "aa", 6 * MB, 100), cached(home, "bb", 6 * MB, 200)
    assert "stay free" in run("limit")
    answer = json.loads(run("limit", "0.008", "--json"))
    assert answer == {"limit": "0.008", "freed_bytes": 6 * MB}
    assert not old.exists() and new.exists()
    assert json.loads(run("ls", "--json"))["bound"] == "0.008"
    assert "stay free" in run("limit", "auto")
    assert "not a cache limit" in run("limit", "much", code=2)


def test_prune_removes_the_oldest_first_and_only_counts_with_dry_run(home):
    old, new = cached(home, "aa", 6 * MB, 100), cached(home, "bb", 6 * MB, 2_000_000_000)
    assert "would free 6.3 MB" in run("prune", "--to", "0.007", "--dry-run") and old.exists()
    assert json.loads(run("prune", "--unused", "720h", "--json"))["chunks"] == 6 * MB
    assert not old.exists() and new.exists()
    assert "auto" in run("prune", "--to", "auto", code=2) and new.exists()
    run("prune", "--to", "0")
    assert not new.exists()


def test_prune_without_a_size_goes_down_to_the_limit(home):
    cache = Cache(home / "cache", 8 * MB)
    old = cached(home, "aa", 6 * MB, 100)
    cached(home, "bb", 6 * MB, 200)
    cache.quarantine("d" * 64, b"x" * MB, "test")
    done = prune(cache, prune_target(cache))
    assert done.chunks == 6 * MB and done.quarantine >= MB and not old.exists() and not cache.quarantined()


def test_prune_removes_records_of_models_that_are_not_here_and_were_not_used_for_a_month(home, tmp_path, monkeypatch):
    cache, names = Cache(home / "cache", UNBOUNDED), ("gone", "cached", "shown", "recorded", "young")
    digests = {}
    for name in names:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.bin").write_text(name)
        digests[name] = read_through(str(folder))
    sources = home / "cache" / "sources"
    files = {name: decode((sources / d).read_bytes(), d, local=True).files[0].digest for name, d in digests.items()}
    logs = private_dir(home / "cache" / "digests")
    copies = private_dir(home / "cache" / "manifests")
    for name in names:
        (logs / files[name]).write_bytes(bytes(32))
    (copies / ("e" * 64)).write_bytes(b"damaged")
    (copies / f"{'e' * 64}.sig").write_bytes(b"ed25519")
    for record in (*sources.glob("*"), *logs.glob("*"), *copies.glob("*")):
        if record.name not in (digests["young"], files["young"]):
            os.utime(record, (100, 100))
    cache.folder(SimpleNamespace(digest=files["cached"])).mkdir(parents=True)
    mounts = private_dir(home / "mounts")
    (mounts / "x.json").write_text(json.dumps({"manifest": digests["recorded"]}))
    entry = MountEntry("1", "0:1", "/m", FSTYPE, f"quickthaw:{digests['shown'][:16]}")
    monkeypatch.setattr("lazyfs.mount.kernel.mount_table", lambda: iter([entry]))
    assert prune(cache, 0, dry_run=True).records == 4 and len(list(sources.glob("*"))) == 5
    assert prune(cache, 0, older_than=1.0).records == 4
    assert {one.name for one in sources.glob("*")} == {digests[name] for name in names[1:]}
    assert {one.name for one in logs.glob("*")} == {files[name] for name in names[1:]} and not list(copies.glob("*"))
    again = read_through(str(tmp_path / "gone"))
    assert again == digests["gone"] and (sources / again).exists()


def test_a_record_that_a_mount_uses_while_others_are_removed_stays(home, tmp_path):
    cache, sources = Cache(home / "cache", UNBOUNDED), home / "cache" / "sources"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.bin").write_text(name)
        os.utime(sources / read_through(str(tmp_path / name)), (100, 100))
    found = unneeded(cache)
    removed = next(found)
    (used,) = set(sources.glob("*")) - {removed}
    os.utime(used)
    assert used not in list(found)


def test_a_manifest_that_is_used_is_not_old(home, tmp_path):
    make_model(tmp_path / "model", megabytes=1)
    digest = read_through(str(tmp_path / "model"))
    record = home / "cache" / "sources" / digest
    os.utime(record, (100, 100))
    assert read_through(str(tmp_path / "model")) == digest and record.stat().st_mtime > 1e9, "its mount comes next"
    os.utime(record, (100, 100))
    nowhere = {n: str(home / n) for n in ("mountpoint", "log_file", "socket", "state_file", "home")}
    load_manifest(MountConfig(manifest=digest, store_url="", cache_dir=str(home / "cache"), **nowhere))
    assert record.stat().st_mtime > 1e9 and not prune(Cache(home / "cache"), 0).records


def test_warm_fetches_a_model_and_refuses_one_without_room(home, tmp_path):
    model = make_model(tmp_path / "model", megabytes=3)
    import_directory(model, tag="toy:v1")
    shutil.rmtree(model)  # else it would be read in place
    assert "disk-full" in run("warm", "toy:v1", "--cache-limit", "0.001", code=1)
    first = json.loads(run("warm", "toy:v1", "--cache-limit", "none", "--json"))[0]
    again = json.loads(run("warm", "toy:v1", "--cache-limit", "none", "--json"))[0]
    assert first["fetched"] == again["present"] > 3 * MB and again["fetched"] == 0
    text = run("ls")
    assert first["manifest"][:16] in text and "of no known manifest" not in text
    assert "no manifest" in run("warm", "nothing:v1", code=1) or "not-found" in run("warm", "nothing:v1", code=1)


def test_warming_the_rest_of_a_file_ends_at_all_of_it(home, tmp_path):
    model = make_model(tmp_path / "model", megabytes=12)
    digest = import_directory(model)
    shutil.rmtree(model)
    places = [str(tmp_path / name) for name in ("log", "socket", "state")]
    config = MountConfig(
        digest,
        str(tmp_path / "m"),
        f"file://{home / 'store'}",
        str(home / "cache"),
        *places,
        str(home),
        cache_limit=UNBOUNDED,
    )
    manifest = load_manifest(config)
    warm(config, manifest)
    file = max(manifest.files, key=lambda file: file.size)
    with contextlib.closing(Cache(home / "cache").open(file)) as there:
        there.mark(0, ABSENT)
    shown = []
    done = warm(config, manifest, lambda now, total: shown.append((now, total)))
    assert done.fetched == file.chunks[0].length < file.size and len(file.chunks) > 1
    assert max(shown) == (file.size, file.size)
