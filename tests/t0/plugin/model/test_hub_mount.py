"""Which model, at which revision, is mounted for a launch of `hf://ORG/MODEL`."""

from types import SimpleNamespace

import pytest

from lazyfs import api
from lazyfs.errors import Usage
from plugin.model import hub_mount

pytestmark = pytest.mark.t0


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The URLs that were mounted; each at the same place."""
    urls = []
    monkeypatch.setattr(api, "read_through", lambda url, **_: urls.append(url) or "0" * 64)
    monkeypatch.setattr(hub_mount, "_say_if_streamed", lambda *_: None)
    monkeypatch.setattr(api, "mount", lambda *_, **__: SimpleNamespace(mountpoint=tmp_path / "mounted"))
    return urls


@pytest.mark.parametrize(
    ("words", "mounted"),
    [
        (("--model", "hf://a/b"), "hf://a/b"),
        (("--model", "hf://a/b@v1"), "hf://a/b@v1"),
        (("--model", "hf://a/b", "--revision", "v2"), "hf://a/b@v2"),
        (("--revision=v1", "--revision=v2", "--model=hf://a/b"), "hf://a/b@v2"),
        (("hf://a/b@v2", "--revision", "v2"), "hf://a/b@v2"),
    ],
)
def test_a_revision_is_that_of_the_url_or_of_its_option(asked, tmp_path, words, mounted):
    found = hub_mount.resolve(words, tmp_path, -1, mounts=True)
    assert asked == [mounted]
    assert any(word.endswith(str(tmp_path / "mounted")) for word in found)


@pytest.mark.parametrize(
    "words", [("--served_model_name", "mine"), ("--served-model-name=mine",), ("--config", "FILE")]
)
def test_a_name_to_serve_under_that_is_given_stays_the_only_one(asked, tmp_path, words):
    file = tmp_path / "options.yaml"
    file.write_text("served-model-name: mine\nrevision: v3\n")
    words = [str(file) if word == "FILE" else word for word in words]
    found = hub_mount.resolve(("--model", "hf://a/b", *words), tmp_path, -1, mounts=True)
    assert found == ("--model", str(tmp_path / "mounted"), *words)
    assert asked == ["hf://a/b@v3" if "--config" in words else "hf://a/b"]


def test_two_revisions_are_refused_before_anything_is_mounted(asked, tmp_path):
    with pytest.raises(Usage, match="two revisions"):
        hub_mount.resolve(("--model", "hf://a/b@v1", "--revision", "v2"), tmp_path, -1, mounts=True)
    assert not asked
