"""A snapshot is restored only if what the engine has read is unchanged; variables of the place are renewed."""

import json
import os
import time

import pytest

from tests.kits.launch_rig import call

pytestmark = [pytest.mark.t1, pytest.mark.timeout(120)]
FLAG = b"seen"


def edit_in_place(file):
    """Change the last bytes of a file, with its size, mtime and inode unchanged."""
    before = file.stat()
    with file.open("r+b") as data:
        data.seek(-len(FLAG), os.SEEK_END)
        data.write(FLAG)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)


@pytest.mark.slow
def test_every_process_of_a_restored_engine_gets_this_launchs_variables(launch_rig):
    then = {"HOSTNAME": "pod-7", "POD_IP": "10.0.0.7", "HF_TOKEN": "hf_old", "OMP_NUM_THREADS": "2"}
    now = {"HOSTNAME": "pod-8", "REDIS_SERVICE_HOST": "10.0.0.9", "OMP_NUM_THREADS": "2"}
    launch_rig.take(env=then)
    unset = {"POD_IP": None, "HF_TOKEN": None}
    for words, options in ((("launch",), ()), (("restore",), (launch_rig.name,))):
        with launch_rig.running(*options, words=words, env=now | unset) as started:
            started.ask()
            facts = started.facts()
            assert started.phases()[0][1] == "restoring"
            assert facts["server"]["values"] == now
            assert facts["worker"]["values"] == now
    manifest = (launch_rig.library.path(launch_rig.name) / "manifest.json").read_text()
    assert "pod-7" not in manifest and "hf_old" not in manifest and '"HF_TOKEN"' in manifest


@pytest.mark.slow
def test_an_unknown_variable_makes_another_launch(launch_rig):
    launch_rig.take("--snapshot-name", "one")
    with launch_rig.running("--snapshot-name", "one", "--no-snapshot", env={"DISABLE_OPENAPI_DOC": "1"}) as started:
        started.ask()
        assert "environment-differs: DISABLE_OPENAPI_DOC" in started.text()
        assert started.phases()[0][-1] == "warming"


@pytest.mark.slow
def test_a_cold_start_names_how_the_models_snapshot_differs(launch_rig):
    launch_rig.take()
    name = launch_rig.name
    with launch_rig.running("--no-snapshot", env={"DISABLE_OPENAPI_DOC": "1"}) as started:
        started.ask()
        assert f"{name} differs: environment-differs: DISABLE_OPENAPI_DOC" in started.text()


@pytest.mark.slow
def test_a_snapshot_without_weights_refuses_other_weights_by_name(launch_rig):
    """Also if size, mtime and inode are unchanged: the weights are read again, and no other check would detect it."""
    answer = launch_rig.take("--weights", "excluded", "--snapshot-name", "thin")
    with launch_rig.running("thin", words=("restore",)) as started:
        assert started.ask() == answer
    edit_in_place(launch_rig.model / "model.safetensors")
    started = launch_rig.start("thin", words=("restore",))
    assert started.process.wait(60) == 1
    assert "model-differs" in started.text()
    # A launch detects it too, and serves the current weights.
    with launch_rig.running("--weights", "excluded", "--snapshot-name", "thin", "--no-snapshot") as started:
        assert started.ask() != answer
        assert "model-differs" in started.text()


def hub_model(rig, revision):
    """Arrange the rig's model as a hub's cache has it, with `revision` and the default branch at separate commits."""
    repo = rig.folder / "hub" / "models--acme--tiny"
    (repo / "refs").mkdir(parents=True)
    for number, (ref, commit) in enumerate((("main", "aaaa"), (revision, "bbbb"), ("next", "cccc"))):
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in rig.model.iterdir():
            data = bytearray(file.read_bytes())
            if file.suffix == ".safetensors":
                data[-1] = number
            (snapshot / file.name).write_bytes(data)
        (repo / "refs" / ref).write_text(commit)
    return repo


@pytest.mark.slow
def test_a_moved_revision_of_a_hub_model_is_another_model(launch_rig):
    repo = hub_model(launch_rig, "dev")
    launch_rig.environment = {"HF_HUB_CACHE": str(launch_rig.folder / "hub")}
    options = {"model": "acme/tiny", "arguments": ("--revision", "dev")}
    launch_rig.take("--snapshot-name", "hub", **options)
    folder = launch_rig.library.load("hub").model_path
    assert folder == str(repo / "snapshots" / "bbbb")
    (repo / "refs" / "main").write_text("cccc")  # that revision was not requested
    with launch_rig.running("--snapshot-name", "hub", **options) as started:
        started.ask()
        assert started.phases()[0][1] == "restoring"
    (repo / "refs" / "dev").write_text("cccc")
    with launch_rig.running("--snapshot-name", "hub", "--no-snapshot", **options) as started:
        started.ask()
        assert "model-differs" in started.text()


@pytest.mark.slow
def test_an_edited_file_of_a_folder_named_by_a_flag_makes_another_launch(launch_rig):
    tokenizer, adapter = launch_rig.folder / "tokenizer", launch_rig.folder / "adapter"
    for folder in (tokenizer, adapter):
        folder.mkdir()
        (folder / "weights.bin").write_bytes(b"x" * (2 << 20))
    (tokenizer / "chat_template.jinja").write_text("{{ messages }}")
    lora = json.dumps({"lora_name": "sql", "lora_path": str(adapter)})
    options = {"arguments": ("--tokenizer-path", str(tokenizer), "--lora-paths", lora)}
    launch_rig.take("--snapshot-name", "one", **options)
    with launch_rig.running("--snapshot-name", "one", **options) as started:
        started.ask()
        assert started.phases()[0][1] == "restoring"
    (tokenizer / "chat_template.jinja").write_text("{{ message }}")
    edit_in_place(adapter / "weights.bin")
    with launch_rig.running("--snapshot-name", "one", "--no-snapshot", **options) as started:
        started.ask()
        assert "arguments-differ: --lora-paths" in started.text()
        assert "arguments-differ: --tokenizer-path" in started.text()


@pytest.mark.slow
def test_an_engine_with_loaded_adapters_is_not_put_to_sleep(launch_rig):
    def load(started, name):
        return call(started.port, "POST", "/load_lora_adapter", {"lora_name": name, "lora_path": "/loras/sql"})[0]

    with launch_rig.running("--sleep-after", "0.3") as started:
        started.ask()
        started.wait_serving()
        started.wait_for("asleep")  # it sleeps, and wakes again
        started.ask()
        assert load(started, "bad") == 400
        started.wait_for("asleep", times=2)  # a refused request has changed nothing
        started.ask()
        assert load(started, "sql") == 200
        started.wait_for("adapters-loaded")
        time.sleep(1.0)
        assert started.phases()[0][-1] == "verifying" and started.status()[0]["phase"] == "serving"
        assert started.ours().count("asleep") == 2 and started.ours().count("adapters-loaded") == 1


@pytest.mark.slow
def test_no_snapshot_is_taken_if_inputs_changed_during_the_start(launch_rig):
    template = launch_rig.folder / "chat.jinja"
    template.write_text("{{ messages }}")
    slow = {"ENGINE_DOUBLE_COMPILE_S": "2"}
    options = {"arguments": ("--chat-template", str(template)), "env": slow}
    with launch_rig.running(**options) as started:
        started.wait_for("quickthaw: loading")
        template.write_text("{{ message }}")
        started.ask()
        started.wait_serving()
        assert "inputs-changed" in started.text() and "arguments-differ: --chat-template" in started.text()
    assert launch_rig.library.names() == []
    launch_rig.take(**options)  # the next start takes one


@pytest.mark.slow
def test_an_edited_module_on_the_python_path_makes_another_launch(launch_rig):
    folder = launch_rig.folder / "patches"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("patched = 1")
    env = {"PYTHONPATH": f"{launch_rig.env()['PYTHONPATH']}:{folder}"}
    launch_rig.take("--snapshot-name", "one", env=env)
    with launch_rig.running("--snapshot-name", "one", env=env) as started:
        started.ask()
        assert started.phases()[0][1] == "restoring"
    (folder / "sitecustomize.py").write_text("patched = 2")
    with launch_rig.running("--snapshot-name", "one", "--no-snapshot", env=env) as started:
        started.ask()
        assert "environment-differs: PYTHONPATH" in started.text()
