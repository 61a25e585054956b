"""When the hub's client is not asked, which takes a second: where the engine itself would not ask the hub."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import launchers
from plugin.engine.hub_download import Download
from plugin.model.hub import HubModels, NotDownloaded

pytestmark = pytest.mark.t0
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = ("config.json", "model.safetensors", "tokenizer.json")


class Place:
    """A state folder and a hub cache with one commit of one model."""

    def __init__(self, folder):
        self.home, self.hf = folder / "home", folder / "hf"
        self.home.mkdir()
        repository = self.hf / "hub" / "models--acme--tiny"
        self.snapshot = repository / "snapshots" / COMMIT
        self.snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
        for name in FILES:
            (self.snapshot / name).write_text("{}")

    def models(self, *arguments, **environment):
        given = {"HF_HOME": str(self.hf), **environment}
        command = launchers.engine("vllm").parse(["acme/tiny", *arguments], given)
        # An interpreter that does not exist: whoever asks the client fails.
        return HubModels(
            SimpleNamespace(
                command=command, environment=given, named=False, home=self.home, engine_python="/nowhere/python"
            )
        )

    def note(self, models, files=FILES):
        request = {"engine": "vllm", "load_format": "auto"}
        models._note(request, [list(files)])


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def asks(models):
    """Whether the hub's client is asked."""
    try:
        models.fetch(None)
    except NotDownloaded as error:
        assert error.code == "hub-not-asked"
        return True
    return False


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_a_complete_cache_is_used_without_the_client(place, variable):
    assert place.models(**{variable: "1"}).fetch(None) == [place.snapshot]
    assert asks(place.models(**{variable: "0"}))
    (place.snapshot / "model.safetensors").unlink()
    assert asks(place.models(**{variable: "1"}))  # and says what is missing


def test_a_branch_is_asked_for_each_time(place):
    place.note(place.models("--revision", COMMIT))
    assert asks(place.models()) and asks(place.models("--revision", "main"))


def test_a_commit_is_asked_for_until_a_download_has_said_what_it_needs(place):
    models = place.models("--revision", COMMIT)
    assert asks(models)
    place.note(models)
    assert place.models("--revision", COMMIT).fetch(None) == [place.snapshot]
    assert asks(place.models("--revision", COMMIT, "--load-format", "pt"))  # needs other files
    assert asks(place.models("--revision", COMMIT, "--trust-remote-code"))
    assert asks(place.models("--revision", COMMIT, HF_HUB_CACHE=str(place.home)))
    (place.snapshot / "tokenizer.json").unlink()
    assert asks(place.models("--revision", COMMIT))


def test_damaged_notes_cost_a_question(place):
    models = place.models("--revision", COMMIT)
    place.note(models)
    (place.home / "hub-commits.json").write_text('{"a": 1')
    assert asks(models)
    place.note(models)
    assert not asks(models)


def test_a_model_that_speculates_for_another_is_left_to_the_client(place):
    (place.snapshot / "config.json").write_text(json.dumps({"speculators_config": {}}))
    assert asks(place.models(HF_HUB_OFFLINE="1"))


def test_a_download_says_which_files_it_was_asked_for(tmp_path):
    class Client:
        def HfApi(self):
            siblings = [SimpleNamespace(rfilename=name) for name in (*FILES, "model.onnx")]
            return SimpleNamespace(model_info=lambda *_, **__: SimpleNamespace(siblings=siblings))

        def snapshot_download(self, *_, **__):
            return str(Path(tmp_path))

    request = {"cache": None, "engine": "vllm", "load_format": "auto", "remote_code": False, "code_revision": None}
    download = Download(Client(), request)
    download.repository("acme/tiny", COMMIT, "model")
    assert sorted(download.needed["acme/tiny", COMMIT, "model"]) == sorted(FILES)
