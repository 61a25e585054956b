"""A mount over the folders that it reads: readers get the bytes or the mount is refused; no read waits for itself."""

from __future__ import annotations

import pytest

from lazyfs.api import import_directory, read_through, unmount
from lazyfs.errors import Usage
from lazyfs.mount import kernel
from tests.kits.lazyfs.rig import LIMIT_S, is_daemon, wait_for, write_model

pytestmark = [
    pytest.mark.usefixtures("home"),
    pytest.mark.t1,
    pytest.mark.skipif(not kernel.may_mount(), reason="needs /dev/fuse and CAP_SYS_ADMIN"),
]
FILES = ["config.json", "model.safetensors", "sub/tokenizer.json"]


@pytest.mark.parametrize(
    ("imported", "mountpoint"),
    [
        pytest.param("models/llama", "models/llama", marks=pytest.mark.slow),
        pytest.param("models/llama", "models", marks=pytest.mark.slow),
        ("by-name", "models/llama"),
    ],
)
def test_an_imported_directory_under_its_own_mount_is_read_from_the_store(rig, imported, mountpoint):
    """Its original is the fastest copy, but the daemon cannot reach it once the mount covers it."""
    (rig.tmp / "models").mkdir()
    model = write_model(rig.tmp / "models" / "llama", [3 << 20, 70_001])
    (rig.tmp / "by-name").symlink_to("models/llama")
    digest = import_directory(rig.tmp / imported)
    reader = rig.reader()
    wanted = {name: reader.ask("digest", str(model / name)) for name in FILES}
    # After unmounting, a sandbox of another test may keep it for a moment.
    handle = rig.mount(digest, mountpoint, orphan_exit_s=0.1)
    assert {name: reader.ask("digest", str(handle.mountpoint / name)) for name in FILES} == wanted
    unmount(handle.mountpoint)
    wait_for(lambda: not is_daemon(handle.pid))
    assert (model / "config.json").exists()


@pytest.mark.parametrize("mountpoint", ["models/llama", "models"])
@pytest.mark.parametrize("use_origin", [True, False])
def test_a_mount_must_not_cover_the_directory_it_reads(rig, mountpoint, use_origin):
    (rig.tmp / "models").mkdir()
    digest = read_through(write_model(rig.tmp / "models" / "llama", [70_001]))
    with pytest.raises(Usage, match="would cover") as raised:
        rig.mount(digest, mountpoint, use_origin=use_origin)
    assert raised.value.code == "mount-over-source"
    assert kernel.mount_at(str(rig.tmp / mountpoint)) is None


def test_a_mount_inside_an_empty_folder_of_its_source_is_allowed(rig):
    """An empty directory of the model hides nothing that the mount needs."""
    model = write_model(rig.tmp / "llama", [70_001])
    (model / "mnt").mkdir()
    handle = rig.mount(read_through(model), "llama/mnt")
    reader = rig.reader()
    assert reader.ask("digest", f"{handle.mountpoint}/config.json") == reader.ask("digest", str(model / "config.json"))


@pytest.mark.parametrize(
    ("mountpoint", "settings"),
    [
        (place, {})
        for place in (
            "home",
            "home/store",
            "home/store/chunks",
            "home/store/chunks/ab",
            "home/store/manifests",
            "home/run",
            "home/mounts",
            "home/index",
            "home/cache/images/x",
        )
    ]
    + [("disk", {"cache_dir": "disk/cache"}), ("disk/cache/images", {"cache_dir": "disk/cache"})],
)
def test_a_mount_does_not_cover_its_store_or_its_cache(rig, mountpoint, settings):
    digest = import_directory(write_model(rig.tmp / "llama", [1000]))
    with pytest.raises(Usage, match="would cover") as raised:
        rig.mount(digest, mountpoint, **{name: rig.tmp / value for name, value in settings.items()})
    assert raised.value.code == "mount-over-source"
    assert kernel.mount_at(str(rig.tmp / mountpoint)) is None


def test_a_mount_beside_the_store_and_the_state_is_allowed(rig):
    """The launcher mounts below the home folder, and users may keep a store and a mount point in one folder."""
    model = write_model(rig.tmp / "llama", [1000])
    digest = import_directory(model, str(rig.tmp / "data"))
    reader = rig.reader()
    wanted = reader.ask("digest", str(model / "config.json"))
    for place in ("home/mounts/0123", "data/mnt"):
        handle = rig.mount(digest, place, store_url=str(rig.tmp / "data"))
        assert reader.ask("digest", f"{handle.mountpoint}/config.json") == wanted


@pytest.mark.slow
def test_two_mounts_that_read_each_other_can_be_killed(rig):
    """Neither covers its own source when it is made, so both are allowed, and a first read blocks forever. SIGKILL does not end a
    daemon that waits in the kernel; aborting the connection does.
    """
    (rig.tmp / "a").mkdir()
    (rig.tmp / "a" / "f").write_bytes(b"x" * 100_000)
    first = rig.mount(read_through(rig.tmp / "a"), "b")
    second = rig.mount(read_through(rig.tmp / "b"), "a")
    reader = rig.reader()
    reader.send("digest", str(rig.tmp / "b" / "f"))
    with pytest.raises(TimeoutError):
        reader.receive(1.0)
    for handle in (second, first):
        assert unmount(handle.mountpoint, force=True, limit_s=3.0)
    for handle in (second, first):
        assert not is_daemon(handle.pid)
        assert kernel.mount_at(str(handle.mountpoint)) is None
    assert reader.receive(LIMIT_S)
