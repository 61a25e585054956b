"""A snapshot does not depend on the state of its host: other ports, other TMPDIR, no log, another state folder, another model path."""

import contextlib
import json
import shutil
import socket
import threading

import pytest

from checkpoint.compatibility.model_files import ModelFiles
from tests.kits.launch_rig import model

pytestmark = [pytest.mark.t1, pytest.mark.xdist_group("launch"), pytest.mark.slow]
RESTORED = ["mounting", "restoring", "waking", "verifying"]
SERVED = ("--served-model-name", "llama")


def restored(started):
    started.wait_serving()
    return started.phases() == [RESTORED]


def test_a_snapshot_needs_nothing_else_of_its_host(launch_rig, tmp_path):
    rig = launch_rig
    (tmp_path / "tmp-then").mkdir()
    (tmp_path / "tmp-now").mkdir()
    answer = rig.take(env={"TMPDIR": str(tmp_path / "tmp-then")})
    name, store = rig.name, tmp_path / "store"
    assert rig.cli("snapshot", "push", name, store).returncode == 0
    before = rig.fresh_home()
    shutil.rmtree(before)
    shutil.rmtree(tmp_path / "tmp-then")
    for log in tmp_path.glob("log-*"):
        log.unlink()
    pulled = rig.cli("snapshot", "pull", name, store)
    assert pulled.returncode == 0, pulled.stderr
    assert ModelFiles(rig.model, rig.home).known_digest(), "the first restore need not read the model"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            # The engine's own port exists only inside the sandbox.
            stack.enter_context(socket.create_server(("127.0.0.1", 8000)))
        more = {"TMPDIR": str(tmp_path / "tmp-now"), "HOSTNAME": "another"}
        started = stack.enter_context(rig.running(env=more))
        assert started.ask() == answer
        assert restored(started)
        assert started.facts()["server"]["pid"] == 1001  # its own PID, independent of the host's PIDs by now


def test_pids_in_use_on_the_host_are_free_in_the_sandbox(launch_rig):
    """At the restore, processes of the host started in between have the engine's PIDs."""
    rig = launch_rig
    answer = rig.take()
    launches = [rig.start(), rig.start()]
    try:
        assert [launch.ask() for launch in launches] == [answer, answer]
        assert all(restored(launch) for launch in launches)
        assert [launch.facts()["server"]["pid"] for launch in launches] == [1001, 1001]
    finally:
        assert {launch.stop() for launch in launches} <= {0, 143}


def test_log_level_and_port_do_not_count_and_a_length_does(launch_rig):
    rig = launch_rig
    rig.take()
    with rig.running(arguments=["--log-level", "debug"], env={"VLLM_PORT": "1234"}) as started:
        started.ask()
        assert restored(started)
    with rig.running("--no-snapshot", arguments=["--context-length", "77"]) as started:
        started.ask()
        started.wait_serving()
        assert "starting" in started.phases()[0]


@pytest.mark.parametrize("weights", ["included", "excluded"])
@pytest.mark.parametrize("mount", ["--mount", "--no-mount"])
def test_the_same_model_at_another_path_with_a_served_name(launch_rig, tmp_path, weights, mount):
    rig = launch_rig
    answer = rig.take("--weights", weights, mount, arguments=SERVED)
    assert rig.library.load(rig.name).weights == weights
    elsewhere = tmp_path / "other" / "place"
    shutil.copytree(rig.model, elsewhere)
    # The first path now has another model, which a restore must not read its weights from.
    shutil.rmtree(rig.model)
    model(rig.model, seed=99)
    with rig.running("--weights", weights, mount, arguments=SERVED, model=elsewhere) as started:
        assert started.ask() == answer
        assert restored(started), started.text()
    assert len(rig.library.names()) == 1


def test_a_missing_model_path_is_refused_and_the_snapshot_replaced(launch_rig, tmp_path):
    rig = launch_rig
    answer = rig.take(arguments=SERVED)
    elsewhere = tmp_path / "elsewhere"
    rig.model.rename(elsewhere)
    with rig.running(arguments=SERVED, model=elsewhere) as started:
        assert started.ask() == answer
        started.wait_serving()
        assert "model-path-missing" in started.ours() and str(rig.model) in started.ours()
        assert "taking it again" in started.ours()
    with rig.running(arguments=SERVED, model=elsewhere) as started:
        assert started.ask() == answer
        assert restored(started)


def test_a_missing_working_folder_is_refused_by_name(launch_rig, tmp_path):
    rig = launch_rig
    folder = tmp_path / "work"
    folder.mkdir()
    rig.take(cwd=folder)
    folder.rmdir()
    checked = rig.cli("snapshot", "inspect", rig.name, "--check")
    assert checked.returncode == 1 and "working-folder-missing" in checked.stdout
    with rig.running() as started:
        started.ask()
        assert "working-folder-missing" in started.ours()


def test_a_named_snapshot_of_another_launch_is_not_replaced(launch_rig):
    rig = launch_rig
    rig.take("--snapshot-name", "prod")
    before = (rig.library.path("prod") / "manifest.json").read_bytes()
    with rig.running("--snapshot-name", "prod", arguments=["--context-length", "77"]) as started:
        started.ask()
        started.wait_serving()
        ours = started.ours()
    assert "arguments-differ: --context-length" in ours and "kept, because another launch" in ours
    assert (rig.library.path("prod") / "manifest.json").read_bytes() == before


def test_every_mismatch_is_in_the_log_and_in_inspect(launch_rig):
    """All differences from this host are listed, each with its code."""
    rig = launch_rig
    rig.take()
    name = rig.name
    rewrite(rig, name, lambda m: m["identity"]["host"].update(kernel="99.0.0", page_size=1, cpu_flags=["no_such_flag"]))
    codes = ["kernel-older", "page-size-differs", "cpu-features-missing: no_such_flag"]
    found = json.loads(rig.cli("snapshot", "inspect", name, "--check", "--json").stdout)
    assert sorted(m["code"] for m in found["mismatches"]) == sorted(codes)
    text = rig.cli("snapshot", "inspect", name, "--check")
    assert text.returncode == 1
    with rig.running("--no-snapshot") as started:
        started.ask()
        started.wait_serving()
        for code in codes:
            assert code in started.ours() and code in text.stdout


def rewrite(rig, name, change):
    """Write a changed manifest with a correct digest, as another honest host would have written it."""
    import msgspec

    from checkpoint.snapshot import manifest

    file = rig.library.path(name) / "manifest.json"
    data = json.loads(file.read_bytes())
    change(data)
    file.write_bytes(manifest.dump(msgspec.convert(data, manifest.Snapshot)))


def test_a_snapshot_of_another_host_of_the_same_launch_is_replaced(launch_rig):
    rig = launch_rig
    rig.take()
    rewrite(rig, rig.name, lambda m: m["identity"]["host"].update(cpu_flags=["no_such_flag"]))
    with rig.running() as started:
        started.ask()
        started.wait_serving()
        assert "taking it again" in started.ours()
    with rig.running() as started:
        started.ask()
        assert restored(started)


def test_a_restore_by_name_from_another_folder_with_a_relative_model(launch_rig, tmp_path):
    rig = launch_rig
    answer = rig.take("--weights", "excluded", cwd=tmp_path, model="model")
    with rig.running(rig.name, words=("restore",)) as started:
        assert started.ask() == answer
        assert restored(started)


def test_a_held_request_reaches_a_replica_only_after_its_weights_are_reloaded(launch_rig):
    rig = launch_rig
    answer = rig.take("--weights", "excluded")
    small = rig.library.load(rig.name)
    assert small.weights == "excluded"
    answers = []
    with rig.running("--weights", "excluded") as started:
        threads = [threading.Thread(target=lambda: answers.append(started.ask())) for _ in range(4)]
        [t.start() for t in threads]
        [t.join(60) for t in threads]
        assert answers == [answer] * 4
        assert restored(started)
