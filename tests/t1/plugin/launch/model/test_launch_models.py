"""Models in every form of a command line: a snapshot where that is sound, otherwise the engine as it would start alone, with one line
that says why.
"""

import shutil

import pytest

pytestmark = [pytest.mark.t1]


@pytest.fixture
def one(rig_of):
    """A rig for behaviour that both engines share."""
    return rig_of("vllm")


ELSEWHERE = {
    "s3": ("s3://bucket/llama", (), {}),
    "gs": ("gs://bucket/llama", ("--load-format", "runai_streamer"), {}),
    "az": ("az://container/llama", (), {}),
    "a file of a hub": ("acme/tiny-GGUF:Q4_K_M", (), {}),
    "a GGUF file of a hub": ("acme/tiny-GGUF/tiny.Q4_K_M.gguf", (), {}),
    "ModelScope": ("acme/tiny", (), {"VLLM_USE_MODELSCOPE": "True", "SGLANG_USE_MODELSCOPE": "true"}),
    "tensorizer": (
        "",
        ("--load-format=tensorizer", "--model-loader-extra-config", '{"tensorizer_uri": "s3://b/m.tensors"}'),
        {},
    ),
    "another process": ("", ("--load-format", "remote_instance"), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "engine"), [*((what, "vllm") for what in ELSEWHERE), ("s3", "sglang"), ("ModelScope", "sglang")]
)
def test_sources_that_only_the_engine_can_read_are_served_plainly(rig_of, what, engine):
    rig = rig_of(engine)
    model, arguments, env = ELSEWHERE[what]
    with rig.running(
        model=model or rig.model, arguments=arguments, env=env | {"ENGINE_DOUBLE_HUB": str(rig.model)}
    ) as started:
        assert started.ask()
        started.wait_serving()
        lines = [line for line in started.ours().splitlines() if "off: model-elsewhere" in line]
        assert len(lines) == 1 and "snapshots" in lines[0], started.text()
        assert "HF_HUB_OFFLINE" not in started.facts()["server"]["environment"]
    assert rig.library.names() == []


def gguf(rig):
    file = rig.model.parent / "models" / "tiny.Q4_K_M.gguf"
    file.parent.mkdir()
    shutil.copy(rig.model / "model.safetensors", file)
    (file.parent / "other.gguf").write_bytes(b"another model")
    return file, ()


def dummy(rig):
    (rig.model / "model.safetensors").unlink()
    return rig.model, ("--load-format", "dummy")


def configured_elsewhere(rig):
    shutil.copytree(rig.model, rig.folder / "config")
    (rig.model / "config.json").unlink()
    return rig.model, ("--hf-config-path", str(rig.folder / "config"))


SOUND = {
    "GGUF by path": gguf,
    "dummy weights": dummy,
    "a configuration elsewhere": configured_elsewhere,
    "bitsandbytes": lambda rig: (rig.model, ("--load-format", "bitsandbytes")),
    "fastsafetensors": lambda rig: (rig.model, ("--load-format", "fastsafetensors")),
    "sharded_state": lambda rig: (rig.model, ("--load-format", "sharded_state")),
    "runai_streamer with a folder": lambda rig: (rig.model, ("--load-format", "runai_streamer")),
}


@pytest.mark.slow
@pytest.mark.parametrize(("what", "engine"), [*((what, "vllm") for what in SOUND), ("GGUF by path", "sglang")])
def test_local_models_of_every_form_are_snapshotted_and_restored(rig_of, what, engine):
    rig = rig_of(engine)
    model, arguments = SOUND[what](rig)
    answer = rig.take(model=model, arguments=arguments)
    with rig.running(model=model, arguments=arguments) as started:
        assert started.ask() == answer
        assert started.phases()[0][1] == "restoring"
        assert "off:" not in started.ours()


@pytest.mark.slow
def test_another_gguf_file_at_the_same_path_is_another_model(one):
    model, _ = gguf(one)
    answer = one.take("--snapshot-name", "gguf", model=model)
    data = bytearray(model.read_bytes())
    data[-1] ^= 255
    model.write_bytes(data)
    with one.running("--snapshot-name", "gguf", "--no-snapshot", model=model) as started:
        assert started.ask() != answer
        assert "model-differs" in started.text()


@pytest.mark.slow
def test_a_files_mode_is_not_content(one):
    answer = one.take()
    for file in one.model.iterdir():
        file.chmod(0o600)
    with one.running() as started:
        assert started.ask() == answer
        assert started.phases()[0][1] == "restoring"


@pytest.mark.slow
def test_a_model_named_by_an_options_file_is_restored(rig):
    file = rig.folder / "engine.yaml"
    flag = "model" if rig.engine == "vllm" else "model-path"
    file.write_text(f"{flag}: {rig.model}\n")
    words = ("launch", "--engine-python", str(rig.python), rig.engine, "--config", str(file))
    answer = rig.take(words=words)
    with rig.running(words=words) as started:
        assert started.ask() == answer
        assert started.phases()[0][1] == "restoring"
