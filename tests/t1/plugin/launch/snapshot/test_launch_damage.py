"""A changed snapshot is refused by name and the engine starts cold under the same held request; and who sees the reason."""

import json
import os
import stat
from pathlib import Path

import pytest

pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch"), pytest.mark.slow]


def flip(file, at=None):
    """Change a byte at `at` (default: the middle), with size, mode and times unchanged."""
    info = file.stat()
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 0x01
    file.write_bytes(data)
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))


def first(folder, pattern):
    return max(folder.glob(pattern), key=lambda path: path.stat().st_size)


def goes_cold(rig, answer, code, *options):
    """Launch with a held request that a cold start answers, and which logs `code`; return the log."""
    with rig.running(*options) as started:
        assert started.ask() == answer
        started.wait_serving()
        phases = started.phases()[0]
        ours = started.ours()
    assert "starting" in phases, phases
    assert code in ours, ours
    assert "starting cold under the same held requests" in ours
    return ours


KINDS = {
    "pages": "images/pages-*.img",
    "core": "images/core-*.img",
    "mm": "images/mm-*.img",
    "pagemap": "images/pagemap-*.img",
    "files": "images/files.img",
    "fdinfo": "images/fdinfo-*.img",
    "pstree": "images/pstree.img",
    "inventory": "images/inventory.img",
    "compiled code": "cache/**/*.so",
}


@pytest.fixture
def taken(launch_rig):
    answer = launch_rig.take()
    return launch_rig, launch_rig.library.path(launch_rig.name), answer


def test_a_flipped_byte_in_each_kind_of_file_is_refused(taken):
    rig, folder, answer = taken
    for kind, pattern in KINDS.items():
        file = first(folder, pattern)
        good = file.read_bytes()
        flip(file)
        ours = goes_cold(rig, answer, "file-digest-differs", "--no-snapshot")
        assert str(file) in ours, kind
        file.write_bytes(good)
        rig.library.clear_failures(rig.name)
    with rig.running() as started:
        assert started.ask() == answer
        started.wait_serving()
        assert "restoring" in started.phases()[0]


def test_a_flipped_byte_in_shared_memory_or_temporary_files_is_refused(launch_rig):
    """The double has neither; files of the test in their places count as its own."""
    rig = launch_rig
    answer = rig.take()
    folder = rig.library.path(rig.name)
    for place in ("shm", "tmp"):
        extra = folder / place / "left-by-nobody"
        extra.write_bytes(b"x")
        goes_cold(rig, answer, "file-unexpected", "--no-snapshot")
        extra.unlink()
        rig.library.clear_failures(rig.name)


def test_every_flipped_bit_of_the_manifest_is_refused(taken):
    from checkpoint.errors import CheckpointError
    from checkpoint.snapshot import manifest

    rig, folder, answer = taken
    file = folder / "manifest.json"
    good = file.read_bytes()
    for at in range(0, len(good), 7):
        bad = bytearray(good)
        bad[at] ^= 0x01
        file.write_bytes(bad)
        with pytest.raises(CheckpointError):
            manifest.load(folder)
    # A number that stays a number: only the digest differs.
    file.write_bytes(good.replace(b'"port": 8000', b'"port": 8001'))
    goes_cold(rig, answer, "manifest-garbled", "--no-snapshot")


def test_truncated_and_missing_files_are_refused(taken):
    rig, folder, answer = taken
    pages = first(folder, "images/pages-*.img")
    os.truncate(pages, pages.stat().st_size - 4096)
    goes_cold(rig, answer, "file-size-differs", "--no-snapshot")
    rig.library.clear_failures(rig.name)
    pages.unlink()
    goes_cold(rig, answer, "file-missing", "--no-snapshot")


def test_a_manifest_of_another_version_is_refused(taken):
    rig, folder, answer = taken
    file = folder / "manifest.json"
    good = file.read_bytes()
    file.write_bytes(json.dumps({"format": 99, "something": "else"}).encode())
    ours = goes_cold(rig, answer, "format-newer")
    assert json.loads(file.read_bytes())["format"] == 99, "an older version must not replace a newer version's snapshot"
    assert "taking it again" not in ours
    file.write_bytes(good)


def test_a_damaged_snapshot_is_replaced_and_restores_again(taken):
    rig, folder, answer = taken
    flip(first(folder, "images/pages-*.img"))
    goes_cold(rig, answer, "file-digest-differs")
    with rig.running() as started:
        assert started.ask() == answer
        started.wait_serving()
        assert "restoring" in started.phases()[0] and "starting" not in started.phases()[0]


def test_a_damaged_working_set_and_ledger_cost_time_only(taken):
    rig, folder, answer = taken
    for _ in range(2):
        with rig.running() as started:
            assert started.ask() == answer
            started.wait_serving()
            assert "starting" not in started.phases()[0]
        for name in ("working-set", ".verified"):
            if (folder / name).exists():
                flip(folder / name)
    with rig.running() as started:
        assert [started.ask() for _ in range(4)] == [answer] * 4
        assert "starting" not in started.phases()[0]


def broken_criu(rig):
    """Return a CRIU that can do everything except restore."""
    real = (rig.home / "criu").resolve() / "criu"
    script = rig.folder / "criu.sh"
    script.write_text(f'#!/bin/sh\n[ "$1" = restore ] && exit 1\nexec {real} "$@"\n')
    script.chmod(0o755)
    return {"QUICKTHAW_CRIU": str(script)}


def test_three_failures_quarantine_a_snapshot_with_the_reason(taken):
    rig, folder, answer = taken
    broken = broken_criu(rig)
    for _ in range(3):
        with rig.running(env=broken) as started:
            assert started.ask() == answer
            assert "criu-restore-failed" in started.ours()
    with rig.running(env=broken) as started:
        assert started.ask() == answer
        started.wait_serving()
        assert "in quarantine after 3 failed restores" in started.ours()
        assert "restoring" not in started.phases()[0]
    said = rig.cli("snapshot", "inspect", rig.name, "--check")
    assert said.returncode == 1
    assert "quarantined" in said.stdout and "criu-restore-failed" in said.stdout
    row = json.loads(rig.cli("snapshot", "ls", "--json").stdout)[0]
    assert row["quarantined"] and row["failures"] == 3 and "criu-restore-failed" in row["reason"]
    # A restore by name reports the same.
    refused = rig.cli("restore", rig.name, "--port", "0")
    assert refused.returncode != 0 and "quarantine" in refused.stderr


def test_strict_fails_instead_of_a_cold_start(taken):
    rig, folder, answer = taken
    flip(first(folder, "images/pages-*.img"))
    started = rig.start("--strict")
    assert started.process.wait(60) == 1
    assert started.ours().count("file-digest-differs") == 1
    assert "starting cold" not in started.ours() and "engine double" not in started.text()
    assert rig.watch.gone() == set()
    started = rig.start("--strict", env={"QUICKTHAW_CRIU": "/nowhere/criu"})
    assert started.process.wait(60) == 1 and "capability-off" in started.ours()


def test_no_other_user_can_read_a_snapshot(taken):
    rig, folder, _ = taken
    for place in (rig.home / "snapshots", folder, folder / "images", folder / "shm", folder / "tmp"):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700, place
    loose = [
        file
        for file in folder.rglob("*")
        if file.is_file() and stat.S_IMODE(file.stat().st_mode) & 0o077 and not file.is_relative_to(folder / "cache")
    ]
    assert loose == []


def test_only_signed_snapshots_are_restored_with_a_trust_key(taken, tmp_path):
    rig, folder, answer = taken
    for name in ("release", "other"):
        assert rig.cli("snapshot", "keygen", tmp_path / name).returncode == 0
    trusting = ("--trust-key", tmp_path / "release.pub")
    # Unsigned: refused, and not replaced by one that would also be refused.
    ours = goes_cold(rig, answer, "signature-", *trusting)
    assert "--sign-key" in ours
    assert not (folder / "manifest.sig").exists()
    # With a sign key it is taken again and then accepted.
    goes_cold(rig, answer, "signature-", *trusting, "--sign-key", tmp_path / "release")
    assert stat.S_IMODE((folder / "manifest.sig").stat().st_mode) == 0o600
    with rig.running(*trusting) as started:
        assert started.ask() == answer
        started.wait_serving()
        assert "starting" not in started.phases()[0]
    goes_cold(rig, answer, "signature-", "--trust-key", tmp_path / "other.pub")
    good = (folder / "manifest.sig").read_bytes()
    flip(folder / "manifest.sig")
    goes_cold(rig, answer, "signature-", *trusting)
    (folder / "manifest.sig").write_bytes(good)
    manifest = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(manifest + b" ")
    goes_cold(rig, answer, "manifest-garbled", *trusting)


SECRET = "sk-Zq81mmcVW0P4aT2fH7yLd93x"


def holding(folder, text):
    """Return the files below a folder that contain the text, without symlinks to them."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    return [str(file.relative_to(folder)) for file in files if text.encode() in file.read_bytes()]


def test_secrets_are_shown_by_name_only_and_can_be_kept_out(launch_rig):
    rig = launch_rig
    rig.environment = {"ACME_API_KEY": SECRET}
    rig.take("--snapshot-name", "plain")
    rig.take("--snapshot-name", "scrubbed", "--scrub-env", "ACME_API_KEY")
    plain, scrubbed = rig.library.path("plain"), rig.library.path("scrubbed")
    # The reason: the engine's memory contains its environment. Nothing else in the snapshot does.
    assert holding(plain, SECRET) and all(name.startswith("images/pages-") for name in holding(plain, SECRET))
    assert holding(scrubbed, SECRET) == [] and holding(scrubbed, "ACME_API_KEY") == []
    found = json.loads(rig.cli("snapshot", "inspect", "plain", "--json").stdout)
    assert "ACME_API_KEY" in found["secrets_present"]
    assert (
        "ACME_API_KEY" not in json.loads(rig.cli("snapshot", "inspect", "scrubbed", "--json").stdout)["secrets_present"]
    )
    assert SECRET not in rig.cli("snapshot", "inspect", "plain").stdout
    with rig.running("--snapshot-name", "scrubbed", "--scrub-env", "ACME_API_KEY") as started:
        started.ask()
        assert "ACME_API_KEY" not in started.facts()["worker"]["environment"]


def test_an_open_file_that_grew_costs_one_cold_start(launch_rig):
    """The restore is tried once, reported with CRIU's message and a kept log, and the snapshot is taken again: the next start restores."""
    launch_rig.environment["ENGINE_DOUBLE_OPENS"] = "engine.lock"
    lock = launch_rig.model.parent / "engine.lock"
    answer = launch_rig.take("--snapshot-name", "mine")
    lock.write_text("of somebody else\n")
    with launch_rig.running("--snapshot-name", "mine") as started:
        assert started.ask() == answer
        started.wait_serving()
        said = started.ours()
        assert said.count("open-file-changed") == 1 and "taking it again" in said, said
        log = said.partition("(log: ")[2].partition(")")[0]
        assert "engine.lock" in Path(log).read_text()
        assert "page server" not in said
    with launch_rig.running("--snapshot-name", "mine") as started:
        assert started.ask() == answer
        assert "restoring" in str(started.phases())
