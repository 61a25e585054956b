"""`quickthaw setup criu`: from a mirror by apt, from files, and whatever goes wrong on the way."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoint.errors import Failed
from lazyfs.mount import kernel
from plugin.setup.criu import install, make_folder
from tests.kits.apt_kit import LIBRARIES, Keys, Mirror, package
from tests.t1.plugin.setup.conftest import error_of

pytestmark = [pytest.mark.t1, pytest.mark.slow]


def from_mirror(mirror, *more):
    return ("setup", "criu", "--mirror", mirror.url, "--keyring", mirror.keyring, *more)


def test_packages_of_a_mirror_become_a_criu_that_needs_nothing_of_the_host(host, mirror):
    done = host.run(*from_mirror(mirror))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"criu 4.2.1 installed in {host.home}/criu (debian sid from {mirror.url})"
    assert done.stdout.splitlines()[1] == "criu check: looks good"
    assert host.works() and host.work_folders() == []
    assert {path.name for path in (host.home / "criu" / "licenses").iterdir()} == {
        *("PACKAGES", "criu", "libcriulibs", "libgcc-s1", "GPL-2", "LGPL-2.1")
    }
    assert (host.home / "criu" / "licenses" / "libgcc-s1").read_text() == "GCC: GPL-3"
    assert "libcriulibs 1.0-1, source libs-source" in (host.home / "criu" / "licenses" / "PACKAGES").read_text()
    libraries = {path.name for path in (host.home / "criu" / "lib").iterdir()}
    assert {"libc.so.6", "libnet.so.9", "libgcc_s.so.1", "ld-linux-x86-64.so.2"} <= libraries
    assert "libthread_db.so.1" not in libraries  # of libc6, but CRIU does not name it
    assert not any(name.startswith("python3") for name in mirror.downloads())
    asked = len(mirror.requests)
    again = host.run(*from_mirror(mirror))
    assert again.returncode == 0 and "it is there already" in again.stdout
    assert len(mirror.requests) == asked


def test_a_launch_and_doctor_find_it(host, debs):
    assert "criu-missing" in host.run("doctor").stdout
    assert host.run("setup", "criu", "--from", debs[0].parent).returncode == 0
    found = host.run("doctor")
    assert f"criu              4.2.1 at {host.home}/criu/criu" in found.stdout
    assert "✓ dump and restore" in found.stdout, found.stdout


def test_a_damaged_download_leaves_the_old_one(host, mirror, debs):
    assert host.run("setup", "criu", "--from", debs[0].parent).returncode == 0
    before = (host.home / "criu" / "criu.bin").stat().st_ino
    mirror.damaged.add(debs[0].name)
    said = error_of(host.run(*from_mirror(mirror, "--force")), "criu-download-failed")
    assert "Hash Sum mismatch" in said and "--from FILE" in said
    assert (host.home / "criu" / "criu.bin").stat().st_ino == before
    assert host.works() and host.work_folders() == []


def test_a_mirror_that_others_signed_is_refused(host, mirror, tmp_path):
    others = Keys(tmp_path / "others")
    try:
        done = host.run("setup", "criu", "--mirror", mirror.url, "--keyring", others.keyring)
    finally:
        others.close()
    assert done.returncode == 1
    error_of(done, "criu-download-failed")
    assert not (host.home / "criu").exists() and mirror.downloads() == []


def test_a_host_that_takes_unsigned_packages_gets_no_unsigned_criu(host, mirror, debs, keys, tmp_path):
    unsigned = Mirror(tmp_path / "unsigned", debs, keys)
    (unsigned.folder / "dists" / "sid" / "InRelease").unlink()
    (tmp_path / "apt.conf").write_text(
        'APT::Get::AllowUnauthenticated "true"; Acquire::AllowInsecureRepositories "true";'
        'Acquire::AllowDowngradeToInsecureRepositories "true";'
    )
    try:
        done = host.run(*from_mirror(unsigned), APT_CONFIG=str(tmp_path / "apt.conf"))
    finally:
        unsigned.close()
    assert "not signed" in error_of(done, "criu-download-failed")
    assert unsigned.downloads() == [] and not (host.home / "criu").exists()


def test_the_hosts_hooks_do_not_run_and_its_default_release_does_not_count(host, mirror, debs, tmp_path):
    """Hooks empty the host's own cache of packages (Docker's images) or refresh catalogues."""
    ran = tmp_path / "ran"
    hooks = "".join(
        f'APT::Update::{name} {{ "touch {ran}"; }};' for name in ("Pre-Invoke", "Post-Invoke", "Post-Invoke-Success")
    )
    (tmp_path / "apt.conf").write_text(f'{hooks} APT::Default-Release "bookworm";')
    mirror.damaged.add(debs[0].name)  # as far as the download is far enough
    done = host.run(*from_mirror(mirror), APT_CONFIG=str(tmp_path / "apt.conf"))
    assert "Hash Sum mismatch" in error_of(done, "criu-download-failed")
    assert not ran.exists()


def test_a_suite_without_a_new_enough_criu_is_named(host, mirror, debs, keys, tmp_path):
    old = Mirror(tmp_path / "old", [package(tmp_path, "criu", {"usr/sbin/criu": b"old"}, "3.17.1-2")], keys)
    try:
        said = error_of(host.run(*from_mirror(old)), "criu-not-offered")
    finally:
        old.close()
    assert "has criu 3.17.1-2; >= 4.2 is needed" in said and "make wheels" in said
    assert old.downloads() == []


def test_a_mirror_that_stalls_is_given_up(host, mirror, debs):
    mirror.held.add(debs[0].name)
    with pytest.raises(Failed) as error:
        install(host.home, lambda _: None, mirror=mirror.url, keyring=mirror.keyring, force=True, limit_s=3.0)
    assert error.value.code == "criu-download-stalled"
    assert host.work_folders() == [] and not (host.home / "criu").exists()


def test_two_at_once_install_it_once(host, mirror):
    both = [host.start(*from_mirror(mirror)) for _ in range(2)]
    said = [one.communicate(timeout=90) for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert sorted("it is there already" in out for out, _ in said) == [False, True]
    assert len(set(mirror.downloads())) == len(mirror.downloads()) and host.works()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_one_that_is_killed_half_way_leaves_the_old_one_and_the_next_removes_its_folder(host, mirror, debs, number):
    assert host.run("setup", "criu", "--from", debs[0].parent).returncode == 0
    mirror.held.add(debs[0].name)
    killed = host.start(*from_mirror(mirror, "--force"))
    assert mirror.asked.wait(60)
    assert len(host.work_folders()) == 1
    killed.send_signal(number)
    killed.communicate(timeout=30)
    assert killed.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 128 + signal.SIGTERM)
    assert host.watch.gone() == set()  # apt too
    assert host.works()
    assert len(host.work_folders()) == (1 if number == signal.SIGKILL else 0)
    mirror.held.clear()
    mirror.release.set()
    assert host.run(*from_mirror(mirror, "--force")).returncode == 0
    assert host.works() and host.work_folders() == []


def test_one_in_a_layer_of_a_container_image_is_replaced(host, debs):
    """overlayfs renames no folder of a layer below."""
    assert host.run("setup", "criu", "--from", debs[0].parent).returncode == 0
    layers = host.home.parent / "layers"
    layers.mkdir()
    script = f"""
        set -e
        mount -t tmpfs -o mode=700 tmpfs {layers}
        mkdir {layers}/upper {layers}/work {layers}/lower
        cp -a {host.home}/. {layers}/lower
        mount -t overlay -o lowerdir={layers}/lower,upperdir={layers}/upper,workdir={layers}/work overlay {host.home}
        echo old > {host.home}/criu/old
        "$@" --force
        {host.home}/criu/criu --version
        ls -A {host.home} {host.home}/criu
    """
    done = host.run("setup", "criu", "--from", debs[0].parent, before=("unshare", "--mount", "sh", "-c", script, "sh"))
    assert done.returncode == 0, done.stderr
    assert "Version: 4." in done.stdout and "criu.bin" in done.stdout
    assert ".setup-criu-" not in done.stdout.replace(".setup-criu.lock", "") and "old" not in done.stdout.split()


@pytest.mark.parametrize("half", [True, False])
def test_one_that_was_killed_between_its_steps_is_brought_back(host, debs, half):
    """Where two folders cannot change names in one step."""
    assert host.run("setup", "criu", "--from", debs[0].parent).returncode == 0
    work = host.home / ".setup-criu-killed"
    work.mkdir()
    (host.home / "criu").rename(work / ".removed-criu-abc")
    if half:
        (host.home / "criu").mkdir()
        (host.home / "criu" / "lib").mkdir()
    done = host.run("setup", "criu", PATH="/nowhere")
    assert done.returncode == 0, done.stderr
    assert "it is there already" in done.stdout
    assert host.works() and host.work_folders() == []


@pytest.mark.parametrize(("size", "old"), [("12m", False), ("24m", True)], ids=["nothing-there", "one-there"])
def test_a_full_disk_is_named_and_leaves_what_was_there(host, debs, size, old):
    """In a mount namespace of its own, so that nothing stays mounted."""
    script = f"""
        set -e
        mkdir -p {host.home} && mount -t tmpfs -o size={size},mode=700 tmpfs {host.home}
        {'"$@" > /dev/null' if old else "true"}
        "$@" --force || code=$?
        ls -A {host.home}
        {host.home}/criu/criu --version || true
        exit $code
    """
    done = host.run("setup", "criu", "--from", debs[0].parent, before=("unshare", "--mount", "sh", "-c", script, "sh"))
    assert done.returncode == 1, done.stderr
    line = next(line for line in done.stderr.splitlines() if line.startswith("quickthaw: "))
    assert line.startswith("quickthaw: disk-full: CRIU could not be installed: No space left on device"), done.stderr
    assert ".setup-criu-" not in done.stdout
    assert ("Version: 4." in done.stdout) == old


def test_a_state_folder_that_cannot_execute_is_named(host, debs):
    script = f'mkdir -p {host.home} && mount -t tmpfs -o noexec,mode=700 tmpfs {host.home} && exec "$@"'
    done = host.run("setup", "criu", "--from", debs[0].parent, before=("unshare", "--mount", "sh", "-c", script, "sh"))
    assert "mounted noexec" in error_of(done, "criu-not-executable")


def test_without_apt_or_a_mirror_the_ways_left_are_named(host, tmp_path):
    done = host.run("setup", "criu", PATH=str(tmp_path))
    assert done.returncode == 3
    said = error_of(done, "criu-no-source")
    assert "this host has no apt" in said and "make wheels" in said and "--from FILE" in said
    (tmp_path / "apt.conf").write_text('Dir::Etc::SourceList "/dev/null"; Dir::Etc::SourceParts "/dev/null";')
    done = host.run("setup", "criu", APT_CONFIG=str(tmp_path / "apt.conf"))
    assert done.returncode == 3
    assert "apt knows no mirror of Debian or Ubuntu" in error_of(done, "criu-no-source")


@pytest.mark.parametrize("compression", ["xz", "zstd", "gzip", "none"])
def test_packages_that_were_carried_here_need_no_network_and_no_dpkg(host, debs, tmp_path, compression):
    binary, libraries = tmp_path / "binary", tmp_path / "libraries"
    for deb, folder in ((debs[0], binary), (debs[1], libraries)):
        subprocess.run(["dpkg-deb", "-x", deb, folder], check=True, timeout=60)
    files = {"usr/sbin/criu": binary / "usr/sbin/criu"}
    one = package(tmp_path, "criu", files, "4.2.1-1", compression=compression)
    done = host.run("setup", "criu", "--from", one, "--from", debs[1], PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert host.works()


def test_a_package_without_the_libraries_it_names_is_incomplete(host, debs):
    done = host.run("setup", "criu", "--from", debs[0])
    assert done.returncode == 1
    assert re.search(
        r"lib\w+\.so\.\d+: cannot open shared object file; give the packages", error_of(done, "criu-incomplete")
    )
    assert "none of the packages holds sbin/criu" in error_of(
        host.run("setup", "criu", "--from", debs[1]), "criu-incomplete"
    )
    assert not (host.home / "criu").exists()


def test_a_wheel_gets_no_library_of_the_host(tmp_path):
    """It would be passed on without its licence."""
    deb = package(tmp_path, "criu", {"usr/sbin/criu": Path("/bin/true")}, "4.2-1")
    with pytest.raises(Failed, match=r"the packages lack ld-linux.*, libc\.so\.6, ") as error:
        make_folder(tmp_path / "made", lambda _: None, [deb])
    assert error.value.code == "criu-incomplete"


@pytest.mark.parametrize("harm", ["truncated", "flipped", "text"])
def test_a_damaged_package_is_named(host, debs, tmp_path, harm):
    data = bytearray(debs[0].read_bytes())
    if harm == "flipped":
        data[len(data) // 2] ^= 1
    damaged = tmp_path / "criu.deb"
    damaged.write_bytes({"truncated": data[: len(data) // 2], "flipped": data, "text": b"not a package\n"}[harm])
    said = error_of(host.run("setup", "criu", "--from", damaged, "--from", debs[1]), "criu-package-damaged")
    assert str(damaged) in said
    assert not (host.home / "criu").exists() and host.work_folders() == []


def test_a_package_of_uncompressed_files_is_checked_by_its_checksums(host, tmp_path):
    deb = package(tmp_path, "criu", {"usr/sbin/criu": b"A" * 4096}, compression="none")
    deb.write_bytes(deb.read_bytes().replace(b"A" * 100, b"A" * 99 + b"B", 1))
    assert "differs from its checksum" in error_of(host.run("setup", "criu", "--from", deb), "criu-package-damaged")


def test_a_package_cannot_write_elsewhere(host, debs, tmp_path):
    """Links and names that lead out of the folder are followed by nothing."""
    aim = tmp_path / "aim"
    aim.write_text("untouched")
    evil = package(tmp_path, "libevil", {f"{LIBRARIES}/libnet.so.9": f"-> {aim}", f"{LIBRARIES}/libevil.so.1": b"x"})
    done = host.run("setup", "criu", "--from", evil, "--from", debs[0], "--from", debs[1])
    assert aim.read_text() == "untouched"
    if done.returncode:
        assert "libnet.so.9" in error_of(done, "criu-incomplete") and not (host.home / "criu").exists()
    else:  # this host has a libnet of its own, which stands in
        installed = host.home / "criu" / "lib" / "libnet.so.9"
        assert not installed.is_symlink() and installed.read_bytes() != aim.read_bytes()


def test_a_criu_that_does_not_start_is_not_installed(host, debs, tmp_path):
    fake = package(tmp_path, "criu", {"usr/sbin/criu": b"#!/bin/sh\necho Version: 4.2\n"}, "4.2-1")
    said = error_of(host.run("setup", "criu", "--from", fake, "--from", debs[1]), "criu-incomplete")
    assert not (host.home / "criu").exists() and said


def test_the_folder_of_another_host_is_copied(host, debs, tmp_path):
    assert host.run("setup", "criu", "--from", debs[0].parent).returncode == 0
    carried = tmp_path / "carried"
    shutil.copytree(host.home / "criu", carried)
    shutil.rmtree(host.home / "criu")
    for file in carried.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)  # as some copies leave them
    assert host.run("setup", "criu", "--from", carried).returncode == 0
    assert host.works()
    shutil.rmtree(host.home / "criu")
    (carried / "criu.bin").write_bytes(b"damaged")
    done = host.run("setup", "criu", "--from", carried)
    error_of(done, "criu-broken")
    assert not (host.home / "criu").exists()


def test_a_criu_that_a_variable_names_comes_first_and_is_said(host, debs, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    error_of(host.run("setup", "criu", QUICKTHAW_CRIU=str(broken)), "criu-broken")
    done = host.run("setup", "criu", "--from", debs[0].parent, QUICKTHAW_CRIU=str(broken))
    assert done.returncode == 0 and f"launches use {broken} instead" in done.stderr


def test_doctor_fixes_what_needs_no_decision(host, debs, mirror, tmp_path):
    host.home.mkdir(mode=0o755)
    host.home.chmod(0o755)
    (host.home / ".setup-criu-dead").mkdir()
    (host.home / "run" / "restore-dead").mkdir(parents=True)
    (host.home / "run" / "criu-kernel-00000000-1-2-3").touch()  # another host's, perhaps
    conf = tmp_path / "apt.conf"
    conf.write_text('Dir::Etc::SourceList "/dev/null"; Dir::Etc::SourceParts "/dev/null";')
    done = host.run("doctor", "--fix", APT_CONFIG=str(conf))
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    assert "+ state folder" in done.stdout and host.home.stat().st_mode & 0o777 == 0o700
    assert "removed 2 folders of killed processes" in done.stdout
    assert host.work_folders() == [] and not (host.home / "run" / "restore-dead").exists()
    assert "! criu" in done.stdout and "criu-no-source" in done.stdout
    assert host.run("setup", "criu", "--from", debs[0].parent).returncode == 0
    done = host.run("doctor", "--fix")
    assert done.stdout.startswith("nothing to fix\n") and done.returncode == 0, done.stdout


def test_doctor_fix_names_what_only_an_administrator_can_grant(host, debs):
    assert host.run("setup", "criu", "--from", debs[0].parent).returncode == 0
    done = host.run("doctor", "--fix", before=("setpriv", "--bounding-set=-all"))
    assert done.returncode == 3
    assert done.stdout.strip().endswith("can grant: privileges"), done.stdout


def test_what_a_living_setup_uses_is_no_leftover(host, mirror, debs):
    mirror.held.add(debs[0].name)
    living = host.start(*from_mirror(mirror))
    assert mirror.asked.wait(60)
    code = "import sys; from pathlib import Path; from plugin.setup.criu import remove_leftovers; print(remove_leftovers(Path(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", code, host.home], env=host.environment, capture_output=True, text=True, timeout=60, check=True
    )  # fmt: skip
    assert done.stdout == "0\n" and len(host.work_folders()) == 1
    os.kill(living.pid, signal.SIGTERM)
    living.communicate(timeout=30)
    limit = time.monotonic() + 10
    while host.work_folders() and time.monotonic() < limit:
        time.sleep(0.05)
    assert host.work_folders() == []


def test_a_disk_that_fills_up_under_apt_is_named(host, mirror):
    script = f'mkdir -p {host.home} && mount -t tmpfs -o size=2m,mode=700 tmpfs {host.home} && exec "$@"'
    done = host.run(*from_mirror(mirror), before=("unshare", "--mount", "sh", "-c", script, "sh"))
    assert done.returncode == 1
    error_of(done, "disk-full")


@pytest.mark.skipif(not kernel.may_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN")
def test_doctor_fix_unmounts_what_a_killed_daemon_left_and_nothing_else(host, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        done = host.run("mount", f"{model}/", place, "--detach")
        assert done.returncode == 0, done.stderr
    try:
        records = [json.loads(path.read_text()) for path in (host.home / "mounts").glob("*.json")]
        pid = next(one["pid"] for one in records if one["mountpoint"] == str(places[0]))
        os.kill(pid, signal.SIGKILL)
        limit = time.monotonic() + 10
        while os.path.exists(places[0] / "config.json") and time.monotonic() < limit:
            time.sleep(0.02)
        assert kernel.mount_at(str(places[0])) is not None
        done = host.run("doctor", "--fix")
        assert f"+ mounts            unmounted {places[0]}, whose daemon was killed" in done.stdout, done.stdout
        assert kernel.mount_at(str(places[0])) is None
        assert (places[1] / "config.json").read_text() == "{}"
        assert "unmounted" not in host.run("doctor", "--fix").stdout
    finally:
        for place in places:
            host.run("mount", "--unmount", place, "--force")
