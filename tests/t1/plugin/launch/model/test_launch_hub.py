"""Models by hub name, from a hub on loopback with the real huggingface_hub: downloaded outside the sandbox, then used like any other.
If that fails, the engine starts as it would alone, and one line says why.
"""

import os
import shutil
import socket
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest

from tests.kits.hub_kit import Hub
from tests.kits.launch_rig import Rig, environment, model

pytestmark = [pytest.mark.t1]
NAME = "acme/tiny"


@pytest.fixture(scope="module")
def hub_double(tmp_path_factory):
    """Return the interpreter of the engine double, with huggingface_hub as every engine has it."""
    python = environment(tmp_path_factory.mktemp("double") / "venv")
    (site,) = python.parents[1].glob("lib/*/site-packages")
    (site / "hub.pth").write_text(str(Path(huggingface_hub.__file__).parents[1]))
    return python


@pytest.fixture
def hub():
    found = Hub()
    yield found
    found.close()


@pytest.fixture
def rig_of(tmp_path, hub_double, hub):
    """Return a rig for an engine whose hub has the rig's model, with a cache of its own."""
    made = []

    def make(engine):
        rig = Rig(tmp_path, hub_double, engine)
        made.append(rig)
        (rig.model / "tokenizer.json").write_text("{}")
        (rig.model / "model.onnx").write_bytes(b"x" * 20000)  # not used by an engine
        (rig.model / "pytorch_model.bin").write_bytes(b"x" * 20000)
        rig.hub = hub
        hub.add(NAME, rig.model)
        rig.environment = hub.environment(tmp_path / "hf", ENGINE_DOUBLE_HUB="1")
        return rig

    yield make
    for rig in made:
        assert rig.watch.gone() == set()


@pytest.fixture
def one(rig_of):
    """A rig for behaviour that both engines share."""
    return rig_of("sglang")


def snapshots(rig):
    return Path(rig.environment["HF_HOME"]) / "hub" / "models--acme--tiny" / "snapshots"


@pytest.mark.slow
def test_a_hub_model_is_downloaded_snapshotted_and_restored(rig):
    with rig.running(model=rig.model) as started:
        local = started.ask()
    with rig.running(model=NAME) as started:
        answer = started.complete()
        started.wait_serving()
        assert answer["choices"][0]["token_ids"] == local  # the same weights
        assert answer["model"] == NAME
        assert started.get("/v1/models")["data"][0]["id"] == NAME
        assert sorted(rig.hub.downloads()) == ["config.json", "model.safetensors", "tokenizer.json"]
        assert f"{NAME} is not in the hub's cache" in started.text()
        assert "off:" not in started.ours()
    (name,) = [name for name in rig.library.names() if "tiny" in name]
    (folder,) = snapshots(rig).iterdir()
    assert rig.library.load(name).model_path == str(folder)
    rig.hub.requests.clear()
    with rig.running(model=NAME) as started:
        assert started.complete()["model"] == NAME
        assert started.ask() == local
        assert started.phases()[0][1] == "restoring"
        assert rig.hub.requests == []  # a restore sends no request to the hub


@pytest.mark.slow
def test_a_host_with_an_empty_cache_restores_from_the_snapshot_store(one):
    """Another host with the hub and a snapshot store only."""
    answer = one.take(model=NAME)
    store = one.folder / "store"
    assert one.cli("snapshot", "push", one.name, str(store)).returncode == 0
    name = one.name
    one.fresh_home()
    shutil.rmtree(one.environment["HF_HOME"])
    with one.running("--snapshot-store", store, model=NAME) as started:
        assert started.ask() == answer
        assert "restoring" in started.phases()[0]
    assert one.name == name


@pytest.mark.slow
def test_revision_token_and_download_folder_are_used(one):
    repository = one.hub.add(NAME, one.model, token="hf_right")
    shutil.rmtree(one.model)
    model(one.model, seed=2)
    old = repository.refs["main"]
    repository.commit("dev")
    repository.refs["main"] = old
    folder = one.folder / "downloads"
    one.environment["HF_TOKEN"] = "hf_right"
    arguments = ("--revision", "dev", "--download-dir", str(folder))
    with one.running("--scrub-env", "HF_TOKEN", model=NAME, arguments=arguments) as started:
        answer = started.ask()
        started.wait_serving()
        assert "HF_TOKEN" not in started.facts()["worker"]["environment"]
    assert [path.name for path in (folder / "models--acme--tiny" / "snapshots").iterdir()] == [repository.refs["dev"]]
    assert not snapshots(one).exists()
    with one.running("--scrub-env", "HF_TOKEN", model=NAME, arguments=arguments) as started:
        assert started.ask() == answer
        assert started.phases()[0][1] == "restoring"
    with one.running() as started:
        assert started.ask() == answer  # seed 2, by its path


@pytest.mark.slow
def test_a_cold_start_uses_the_newest_commit(one):
    before = one.take(model=NAME)
    repository = one.hub.repositories[NAME]
    shutil.rmtree(one.model)
    model(one.model, seed=3)
    repository.commit()
    with one.running("--no-restore", "--no-snapshot", model=NAME) as started:
        assert started.ask() != before


@pytest.mark.slow
def test_a_commit_that_is_in_the_cache_is_not_asked_for(one):
    commit = one.hub.repositories[NAME].refs["main"]
    arguments = ("--revision", commit)
    with one.running("--no-snapshot", model=NAME, arguments=arguments) as started:
        answer = started.ask()
    assert one.hub.downloads()
    one.hub.requests.clear()
    with one.running("--no-snapshot", model=NAME, arguments=arguments) as started:
        assert started.ask() == answer
    assert one.hub.requests == []
    (snapshots(one) / commit / "tokenizer.json").unlink()
    with one.running("--no-snapshot", model=NAME, arguments=arguments) as started:
        assert started.ask() == answer
    assert one.hub.requests and (snapshots(one) / commit / "tokenizer.json").exists()


@pytest.mark.slow
def test_a_commit_during_a_start_makes_no_snapshot(one):
    """Another launch may have downloaded it, and it is unknown which of the two the engine has read."""
    with one.running(model=NAME, env={"ENGINE_DOUBLE_COMPILE_S": "3"}) as started:
        started.wait_for("quickthaw: loading")
        (commit,) = snapshots(one).iterdir()
        shutil.copytree(commit, commit.with_name("f" * 40))
        (commit.parents[1] / "refs" / "main").write_text("f" * 40)
        started.ask()
        started.wait_serving()
        assert "no snapshot: inputs-changed" in started.ours()
    assert one.library.names() == []


@pytest.mark.slow
def test_a_complete_read_only_cache_needs_no_hub(one):
    with one.running("--no-snapshot", model=NAME) as started:
        started.ask()
    one.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    with one.running(
        model=NAME, prefix=("unshare", "--mount", "sh", "-c", _READ_ONLY, one.environment["HF_HOME"])
    ) as started:
        started.ask()
        started.wait_serving()
        assert "off:" not in started.ours()
        assert "snapshotted" in started.text() or one.library.names()


_READ_ONLY = 'mount --make-rprivate / && mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda hub, env: hub.repositories.clear(), "hub-no-model"),
        (lambda hub, env: setattr(hub.repositories[NAME], "token", "hf_other"), "hub-no-model"),
        (lambda hub, env: hub.add(NAME, hub.repositories[NAME].folder, token="hf_other", gated=True), "hub-gated"),
        (
            lambda hub, env: (
                env.update(HF_TOKEN="hf_mine") or hub.add(NAME, hub.repositories[NAME].folder, token="t", gated=True)
            ),
            "hub-gated",
        ),
        (lambda hub, env: hub.repositories[NAME].refs.clear(), "hub-no-revision"),
        (lambda hub, env: env.update(HF_ENDPOINT="http://127.0.0.1:9"), "hub-unreachable"),
        (lambda hub, env: env.update(HF_HUB_OFFLINE="1"), "hub-unreachable"),
        (lambda hub, env: Path(env["HF_HOME"]).write_text("no folder"), "hub-"),
    ],
    ids=["no such model", "private", "gated", "not granted", "no revision", "no network", "offline", "no cache"],
)
def test_a_failed_download_is_left_to_the_engine(one, spoil, code):
    spoil(one.hub, one.environment)
    started = one.start(model=NAME)
    assert started.process.wait(60) != 0  # as alone: without this the double reads no hub
    lines = [line for line in started.ours().splitlines() if f"off: {code}" in line]
    assert len(lines) == 1, started.text()
    assert "the engine loads its model itself" in lines[0]
    assert "engine double: no model" in started.text()
    assert "Traceback" not in started.ours()


@pytest.mark.slow
def test_a_model_that_only_the_engine_can_download_is_served_plainly(one):
    """The engine has its own environment: it runs outside a sandbox, not offline."""
    shutil.rmtree(one.folder / "hf", ignore_errors=True)
    one.hub.repositories.clear()
    with one.running(model=NAME, env={"ENGINE_DOUBLE_HUB": str(one.model)}) as started:
        started.ask()
        assert "off: hub-no-model" in started.ours()
        assert "HF_HUB_OFFLINE" not in started.facts()["server"]["environment"]


@pytest.mark.slow
def test_the_wait_for_a_silent_hub_is_limited(one):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mute = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HUB_ETAG_TIMEOUT": "1"}
        with one.running(model=NAME, env={**mute, "ENGINE_DOUBLE_HUB": str(one.model)}) as started:
            started.ask()
            assert "off: hub-unreachable" in started.ours()
        with one.running("--no-snapshot", model=NAME) as started:
            started.ask()
        with one.running(model=NAME, env=mute) as started:  # the cache is complete
            started.ask()
            assert "off:" not in started.ours()


@pytest.mark.slow
def test_a_full_disk_during_a_download_is_named(one):
    disk = one.folder / "hf"
    disk.mkdir()
    small = 'mount --make-rprivate / && mount -t tmpfs -o size=1m none "$0" && exec "$@"'
    with one.running(model=NAME, prefix=("unshare", "--mount", "sh", "-c", small, str(disk))) as started:
        started.wait_for("off: hub-disk-full")


def start_until_the_weights_are_held(one):
    """Start a launch whose download of the weights the hub holds after its first bytes."""
    one.hub.hold = threading.Event()
    started = one.start(model=NAME)
    limit = time.monotonic() + 30
    while "model.safetensors" not in one.hub.downloads():
        assert time.monotonic() < limit, started.text()
        time.sleep(0.02)
    return started


@pytest.mark.slow
def test_an_interrupted_download_is_resumed(one):
    started = start_until_the_weights_are_held(one)
    began = time.monotonic()
    assert started.stop() == 143
    assert time.monotonic() - began < 10
    assert one.watch.gone() == set()
    one.hub.hold.set()
    one.hub.hold = None
    with one.running(model=NAME) as started:
        started.ask()
        assert "off:" not in started.ours()


@pytest.mark.slow
def test_a_download_ends_with_a_killed_launch(one):
    started = start_until_the_weights_are_held(one)
    started.process.kill()
    started.process.wait(10)
    assert one.watch.gone() == set()
    one.hub.hold.set()


@pytest.mark.slow
def test_a_request_is_held_during_the_download(one):
    one.hub.hold = threading.Event()
    answers = []
    with one.running(model=NAME) as started:
        asking = threading.Thread(target=lambda: answers.append(started.ask()))
        asking.start()
        limit = time.monotonic() + 30
        while "model.safetensors" not in one.hub.downloads():
            assert time.monotonic() < limit, started.text()
            time.sleep(0.02)
        while started.get("/-/status")["pools"][0]["held"] != 1:
            assert time.monotonic() < limit, started.text()
            time.sleep(0.02)
        assert not answers
        one.hub.hold.set()
        asking.join(60)
    assert answers


@pytest.mark.slow
def test_a_hub_tokenizer_and_adapter_are_downloaded_and_count(one):
    for name in ("tok", "sql"):
        folder = one.folder / name
        folder.mkdir()
        (folder / "tokenizer.json").write_text(name)
        (folder / "adapter.safetensors").write_bytes(b"x" * 20000)
        one.hub.add(f"acme/{name}", folder)
    arguments = ("--tokenizer-path", "acme/tok", "--lora-paths", "sql=acme/sql")
    one.take(arguments=arguments)
    assert sorted(one.hub.downloads()) == ["adapter.safetensors", "tokenizer.json", "tokenizer.json"]
    with one.running(arguments=arguments) as started:
        started.ask()
        assert started.phases()[0][1] == "restoring"
    assert os.listdir(Path(one.environment["HF_HOME"]) / "hub" / "models--acme--tok" / "snapshots")


@pytest.mark.slow
def test_a_model_by_its_hub_url_is_read_through_a_mount_and_restored(rig):
    with rig.running(model=rig.model) as started:
        local = started.ask()
    rig.hub.redirects = True
    with rig.running(model=f"hf://{NAME}@main") as started:
        answer = started.complete()
        assert answer["choices"][0]["token_ids"] == local and answer["model"] == NAME
        started.wait_serving()
        (place,) = (rig.home / "mounts").glob("*/config.json")
        assert sorted(file.name for file in place.parent.iterdir()) == [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
        ]
        assert not snapshots(rig).exists(), "nothing was downloaded by the hub's own client"
    with rig.running(model=f"hf://{NAME}@main") as started:
        assert started.ask() == local
        started.wait_serving()
        assert "restoring" in started.phases()[0]


@pytest.mark.slow
def test_without_a_mount_the_engine_downloads_a_model_that_is_named_by_its_url(one):
    with one.running("--no-mount", "--no-snapshot", model=f"hf://{NAME}") as started:
        assert started.complete()["model"] == NAME
        assert snapshots(one).exists()
