"""Hosts that lack something: the engine starts as it would alone, and one line names what is off and the remedy."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.kits.launch_rig import fill

pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch")]


def off(started):
    """The lines that say which layers are off."""
    return [line for line in started.ours().splitlines() if " off: " in line]


@pytest.fixture
def old_criu(tmp_path):
    """A folder for the PATH with a CRIU as Debian 12's: it starts, and is too old."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "criu").write_text("#!/bin/sh\necho 'Version: 3.17.1'\n")
    (folder / "criu").chmod(0o755)
    return folder


@pytest.mark.slow
def test_an_old_criu_on_the_path_turns_snapshots_off(launch_rig, old_criu):
    (launch_rig.home / "criu").unlink()
    with launch_rig.running(env={"PATH": f"{old_criu}:{os.environ['PATH']}"}) as started:
        assert started.ask()
        assert len(off(started)) == 1, started.ours()
        assert "snapshots off: criu-too-old" in off(started)[0] and str(old_criu) in off(started)[0]
    assert launch_rig.library.names() == []


@pytest.mark.slow
def test_an_old_criu_on_the_path_does_not_hide_the_private_one(launch_rig, old_criu):
    env = {"PATH": f"{old_criu}:{os.environ['PATH']}"}
    launch_rig.take(env=env)
    with launch_rig.running(env=env) as started:
        started.ask()
        assert off(started) == [] and "restoring" in started.text()


@pytest.mark.slow
def test_a_private_criu_that_does_not_start_is_passed_over(launch_rig, old_criu):
    (launch_rig.home / "criu").unlink()
    (launch_rig.home / "criu").mkdir()
    (launch_rig.home / "criu" / "criu").write_text("#!/bin/sh\nexit 1\n")
    (launch_rig.home / "criu" / "criu").chmod(0o755)
    with launch_rig.running(env={"PATH": f"{old_criu}:{os.environ['PATH']}"}) as started:
        assert started.ask()
        assert "snapshots off: criu-broken" in off(started)[0]


# Privileges: setpriv(1) and unshare(1) take away what a container would not have given.


def without(*capabilities):
    """A prefix for a command that may not have these capabilities."""
    return ["setpriv", "--bounding-set", ",".join(f"-{name}" for name in capabilities)]


def after(script):
    """A prefix for a command in a mount namespace that a shell prepares."""
    return ["unshare", "--mount", "sh", "-c", f'{script} && exec "$@"', "sh"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prefix", "layers", "named"),
    [
        (
            without("net_admin"),
            "snapshots",
            "missing CAP_NET_ADMIN; run as root, in a container add --cap-add NET_ADMIN",
        ),
        (without("sys_admin"), "lazy weights, sandbox, snapshots", "CAP_SYS_ADMIN"),
        (without("all"), "lazy weights, sandbox, snapshots", "--cap-add SYS_ADMIN --cap-add NET_ADMIN"),
        (["unshare", "-Ur"], "lazy weights, sandbox, snapshots", "the host's user namespace"),
        (["unshare", "-Urm"], "lazy weights, sandbox, snapshots", "the host's user namespace"),
        (
            after("mount --bind /dev/null /dev/fuse"),
            "lazy weights",
            "missing /dev/fuse; run as root, in a container add --device /dev/fuse",
        ),
        (
            after("mount -t tmpfs -o ro none /run"),
            "lazy weights, sandbox, snapshots",
            "sandbox-run-dir: cannot create /run/quickthaw",
        ),
        (["setpriv", "--no-new-privs"], None, None),
        (after("mount -t tmpfs none /dev/net"), None, None),
    ],
    ids=["net_admin", "sys_admin", "none", "user-namespace", "user-and-mounts", "fuse", "run", "no-new-privs", "tun"],
)
def test_what_is_missing_is_named_as_doctor_does_and_the_engine_serves(launch_rig, prefix, layers, named):
    with launch_rig.running(prefix=prefix) as started:
        assert started.ask()
        started.wait_serving()
        found = started.off()
        if layers is None:
            assert found == {}
        else:
            assert list(found) == [layers] and named in found[layers] and "again" not in found[layers], started.ours()
    assert bool(launch_rig.library.names()) == ("snapshots" not in (layers or ""))
    told = launch_rig.doctor(prefix)
    assert all(any(why in line for line in told) for why in found.values()), (found, told)
    assert bool(told) == bool(found)


@pytest.mark.slow
def test_that_a_sandbox_works_is_remembered_until_it_is_refused(launch_rig):
    def notes():
        return list((launch_rig.home / "run").glob("sandbox-*"))

    assert launch_rig.doctor() == []
    (note,) = notes()
    hidden = after("mount --make-rslave / && mount -t tmpfs none /run && touch /run/quickthaw")
    with launch_rig.running("--no-mount", prefix=hidden) as started:
        assert started.ask()
        assert "sandbox-run-dir" in "".join(started.off().values()), started.ours()
    assert notes() == []
    with launch_rig.running("--no-mount", "--no-snapshot") as started:
        assert started.ask() and started.off() == {}
    assert notes() == [note]


def test_strict_refuses_what_is_missing(launch_rig):
    started = launch_rig.start("--strict", prefix=without("net_admin"))
    assert started.process.wait(30) == 1
    assert "capability-off" in started.ours() and "CAP_NET_ADMIN" in started.ours()


@pytest.mark.slow
def test_without_sys_ptrace_and_sys_time_a_snapshot_is_taken_and_restored(launch_rig):
    prefix = without("sys_ptrace", "sys_time", "sys_resource")
    answer = launch_rig.take(prefix=prefix)
    with launch_rig.running(prefix=prefix) as started:
        assert started.ask() == answer
        (line,) = off(started)
        assert "pages on demand off: missing CAP_SYS_PTRACE" in line
        assert started.phases() == [["mounting", "restoring", "waking", "verifying"]]


@pytest.mark.slow
def test_no_snapshot_is_taken_where_a_restore_cannot_work(launch_rig, tmp_path):
    """A CRIU that dumps and does not restore: found out beside the loading engine, before anything is dumped."""
    real = launch_rig.home / "criu" / "criu"
    double = tmp_path / "criu"
    double.write_text(f'#!/bin/sh\ncase "$1" in restore) exit 1;; esac\nexec {real} "$@"\n')
    double.chmod(0o755)
    with launch_rig.running(env={"QUICKTHAW_CRIU": str(double)}) as started:
        assert started.ask()
        started.wait_serving()
        (line,) = off(started)
        assert line.startswith("quickthaw: snapshots off: criu-restore-failed") and "doctor" in line
        assert "checkpointing" not in started.text()
    assert launch_rig.library.names() == []


# The state folder


@pytest.mark.slow
def test_a_state_folder_below_dev_shm_costs_the_layers(launch_rig, shm_folder):
    launch_rig.fresh_home(shm_folder / "home")
    with launch_rig.running() as started:
        assert started.ask()
        assert list(started.off()) == ["lazy weights, sandbox, snapshots"]
        assert f"state-folder-hidden: {launch_rig.home} lies below /dev/shm" in "".join(started.off().values())
    assert any("state-folder-hidden" in line for line in launch_rig.doctor())


@pytest.fixture
def shm_folder():
    """A folder below /dev/shm."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="quickthaw-test-") as made:
        yield Path(made)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["model", "tokenizer", "variable"])
def test_what_a_launch_reads_below_dev_shm_gives_a_plain_start(launch_rig, shm_folder, what):
    shown = shm_folder / "model"
    shutil.copytree(launch_rig.model, shown)
    more = {
        "model": {"model": shown},
        "tokenizer": {"arguments": ("--tokenizer-path", shown)},
        "variable": {"env": {"HF_HOME": str(shown)}},
    }
    with launch_rig.running(**more[what]) as started:
        assert started.ask()
        started.wait_serving()
        assert list(started.off()) == ["lazy weights, sandbox, snapshots"]
        assert f"input-hidden: {shown} lies below /dev/shm" in "".join(started.off().values())


@pytest.mark.slow
@pytest.mark.parametrize(("size", "read_only"), [("64k", False), ("256m", True)], ids=["full", "read-only"])
def test_a_state_folder_that_cannot_be_written_costs_the_layers(outside, small_disk, size, read_only):
    small_disk(size, read_only)
    with outside.running() as started:
        assert started.ask()
        (line,) = off(started)
        assert line.startswith("quickthaw: lazy weights, sandbox, snapshots off: state-folder-"), line
        assert str(outside.home) in line and "QUICKTHAW_HOME" in line
    result = outside.cli("doctor")
    assert result.returncode == 3
    (line,) = [line for line in result.stdout.splitlines() if "✗" in line]
    assert "state folder" in line and "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_disk_that_fills_up_under_a_snapshot_still_serves(outside, small_disk):
    small_disk("512m")
    answer = outside.take()
    fill(outside.home)
    for _ in range(2):
        with outside.running() as started:
            assert started.ask() == answer
    subprocess.run(["mount", "-o", "remount,ro", outside.home], check=True, timeout=10)
    with outside.running() as started:
        assert started.ask() == answer


def remount_read_only(home):
    """From now on no write succeeds there, for whatever has no file open for writing."""
    subprocess.run(["mount", "-o", "remount,ro", home], check=False, capture_output=True, timeout=10)


@pytest.mark.slow
def test_a_disk_too_small_for_a_snapshot_costs_the_snapshot_alone(outside, small_disk):
    small_disk("80m")  # more than a cold start needs, less than a dump does
    with outside.running() as started:
        answer = started.ask()
        started.wait_serving()
        assert off(started) == [] and "no snapshot: disk-full" in started.ours(), started.ours()
        fill(outside.home)
        assert started.ask() == answer
        remount_read_only(outside.home)
        assert started.ask() == answer


@pytest.mark.slow
def test_a_restore_that_cannot_keep_what_it_learns_serves(outside, small_disk):
    small_disk("512m")
    answer = outside.take()
    with outside.running() as started:
        assert started.ask() == answer
        fill(outside.home)
        for _ in range(4):  # past the moment at which the working set would be kept
            assert started.ask() == answer
        assert "failed" not in started.ours()
    with outside.running("--sleep-after", "1s") as started:
        assert started.ask() == answer
        started.wait_for("quickthaw: asleep")
        assert started.ask() == answer


def test_strict_names_a_state_folder_that_is_full(outside, small_disk):
    small_disk("64k")
    started = outside.start("--strict")
    assert started.process.wait(30) == 1
    assert (
        "capability-off" in started.ours()
        and "state-folder-full" in started.ours()
        and "Traceback" not in started.text()
    )


@pytest.mark.slow
def test_a_model_that_cannot_be_read_is_served_plainly_by_every_replica(launch_rig):
    (launch_rig.model / "notes.bin").symlink_to("/proc/self/mem")  # a file that nobody can read from its beginning
    with launch_rig.running("--replicas", "2") as started:
        assert started.ask()
        started.wait_serving()
        (line,) = off(started)
        assert line.startswith("quickthaw: lazy weights, sandbox, snapshots off: host-io: "), line


@pytest.mark.slow
def test_a_store_that_cannot_be_written_costs_the_mount_only(launch_rig):
    store = launch_rig.folder / "store"
    store.write_text("a file where the chunks would lie")
    answer = launch_rig.take("--store", store)
    with launch_rig.running("--store", store) as started:
        assert started.ask() == answer
        assert started.phases()[0][1] == "restoring"
        started.wait_for("the model is not in ")
    assert "off:" not in started.ours()


def imported(store):
    """Whether a store has a manifest."""
    return (store / "manifests").is_dir() and any((store / "manifests").iterdir())


@pytest.mark.slow
def test_a_model_is_imported_into_a_named_store_while_the_engine_serves(launch_rig):
    """Not before: a model of 140 GB starts at once."""
    store = launch_rig.folder / "store"
    with launch_rig.running("--store", store) as started:
        answer = started.ask()
        started.wait_for("quickthaw: the model is in ")
        assert started.text().index("quickthaw: serving") < started.text().index("importing the model into ")
    assert imported(store)
    with launch_rig.running("--store", store) as started:  # as chunks, which exist now
        assert started.ask() == answer
        started.wait_serving()
    assert "importing" not in started.ours() and "off:" not in started.ours()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_import_ends_with_its_launch(launch_rig, number):
    with (launch_rig.model / "large.bin").open("wb") as file:
        file.truncate(60 << 30)
    store = launch_rig.folder / "store"
    started = launch_rig.start("--no-snapshot", "--store", store)
    started.ask()
    started.wait_for("importing the model into ")
    limit = time.monotonic() + 30
    while not any("store_import" in line for line in launch_rig.watch.new()):
        assert time.monotonic() < limit, started.text()
        time.sleep(0.02)
    began = time.monotonic()
    assert started.stop(number) in (0, 143, -9)
    assert launch_rig.watch.gone() == set()
    assert time.monotonic() - began < 30
    assert not imported(store) and "Traceback" not in started.ours()


@pytest.mark.slow
def test_a_launch_copies_nothing_of_its_model(launch_rig):
    """Sparse files stand for a large model: what was written counts, not what was read."""
    with (launch_rig.model / "large.bin").open("wb") as file:
        file.truncate(30 << 30)
    with launch_rig.running("--no-snapshot") as started:
        started.ask()
        started.wait_serving()
    assert not list(launch_rig.home.rglob("chunks"))
    written = sum(f.stat().st_blocks * 512 for f in launch_rig.home.rglob("*") if f.is_file() and not f.is_symlink())
    assert written < 4 << 20
