"""Manifests of weights are signed at the import, and a mount that trusts keys shows no other."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from click.testing import CliRunner

from lazyfs.admin.gc import collect
from lazyfs.admin.listing import remove
from lazyfs.api import read_through
from lazyfs.cli.weights import weights
from lazyfs.content.chunk_store import ChunkStore
from lazyfs.errors import Integrity, LazyfsError
from lazyfs.mount import client
from lazyfs.mount.config import MountConfig
from lazyfs.mount.manifest_source import load_manifest
from lazyfs.signing import keygen, signer
from lazyfs.stores.local import LocalStore
from tests.kits.lazyfs.models import make_model

pytestmark = [pytest.mark.t0, pytest.mark.usefixtures("home")]


@pytest.fixture
def keys(tmp_path):
    """Two key pairs: (private, public) of each."""
    made = []
    for name in ("ours", "theirs"):
        keygen(tmp_path / name)
        made.append((tmp_path / name, tmp_path / f"{name}.pub"))
    return made


@pytest.fixture
def imported(tmp_path, keys):
    """A model, imported and signed by the first key; its digest."""
    make_model(tmp_path / "model", megabytes=1)
    done = CliRunner().invoke(
        weights, ["import", str(tmp_path / "model"), "--sign-key", str(keys[0][0]), "--tag", "m:v1"]
    )
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()[0]


def load(home, digest, *trusted):
    names = {n: str(home / n) for n in ("mountpoint", "log_file", "socket", "state_file", "home")}
    config = MountConfig(
        manifest=digest, store_url=f"file://{home / 'store'}", cache_dir=str(home / "cache"), trust_keys=tuple(map(str, trusted)), **names
    )  # fmt: skip
    return load_manifest(config)


class SlowStore(LocalStore):
    """Reading signatures takes a while."""

    def get(self, key, *arguments, **named):
        found = super().get(key, *arguments, **named)
        if key.startswith("signatures/"):
            time.sleep(0.02)
        return found


def test_of_many_signers_at_once_none_is_lost(home, imported, tmp_path):
    chunks, made = ChunkStore(SlowStore(home / "store")), []
    for number in range(6):
        keygen(tmp_path / f"k{number}")
        made.append(signer(tmp_path / f"k{number}"))
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda sign: chunks.sign_manifest(imported, sign), made))
    assert len(chunks.signatures(imported).splitlines()) == 7
    assert not list(chunks.store.list("locks/"))


def test_a_signer_that_was_killed_stops_no_other(home, keys, imported, monkeypatch):
    monkeypatch.setattr("lazyfs.content.chunk_store._SIGNING_S", 0.2)
    chunks = ChunkStore(LocalStore(home / "store"))
    assert chunks.store.create(f"locks/signing-{imported}", b"killed")
    chunks.sign_manifest(imported, signer(keys[1][0]))
    assert load(home, imported, keys[1][1]) and not list(chunks.store.list("locks/"))


def test_a_slow_signer_leaves_the_lock_of_the_one_that_took_over(home, imported):
    chunks, key = ChunkStore(LocalStore(home / "store")), f"locks/signing-{imported}"
    with chunks._signing(imported):
        chunks.store.put(key, b"another signer's")
    assert bytes(chunks.store.get(key)) == b"another signer's"


def test_a_signed_manifest_is_shown_and_no_other(home, keys, imported):
    (_, ours), (_, theirs) = keys
    assert load(home, imported, ours).size == load(home, imported, theirs, ours).size == load(home, imported).size
    with pytest.raises(Integrity, match="only .* is trusted") as caught:
        load(home, imported, theirs)
    assert caught.value.code == "signature-wrong"


def test_a_second_import_is_offered_with_both_signatures(home, keys, imported, tmp_path):
    (_, ours), (private, theirs) = keys
    chunks = ChunkStore(LocalStore(home / "store"))
    chunks.sign_manifest(imported, signer(private))
    chunks.sign_manifest(imported, signer(private))
    assert len(chunks.signatures(imported).splitlines()) == 2
    assert load(home, imported, theirs) == load(home, imported, ours)


def test_an_unsigned_manifest_and_a_changed_signature_are_refused(home, keys, imported):
    chunks = ChunkStore(LocalStore(home / "store"))
    lines = chunks.signatures(imported)
    chunks.store.put(f"signatures/{imported}", lines.replace(lines[-20:-10], b"A" * 10))
    with pytest.raises(Integrity) as caught:
        load(home, imported, keys[0][1])
    assert caught.value.code == "signature-wrong"
    chunks.store.delete(f"signatures/{imported}")
    with pytest.raises(Integrity, match="not signed") as caught:
        load(home, imported, keys[0][1])
    assert caught.value.code == "signature-missing"


def test_a_signature_of_a_snapshot_signs_no_weights(home, keys, imported):
    from checkpoint.snapshot import signatures

    chunks = ChunkStore(LocalStore(home / "store"))
    chunks.store.put(f"signatures/{imported}", signatures.signer(keys[0][0])(chunks.store.get(f"manifests/{imported}")))
    with pytest.raises(Integrity) as caught:
        load(home, imported, keys[0][1])
    assert caught.value.code == "signature-wrong"


def test_the_checked_signature_is_kept_beside_the_manifest(home, keys, imported):
    load(home, imported, keys[0][1])
    (home / "store").rename(home / "away")
    assert load(home, imported, keys[0][1]).files


def test_what_is_read_in_place_has_no_signature(home, keys, tmp_path, imported):
    digest = read_through(tmp_path / "model")
    assert load(home, digest).files
    with pytest.raises(Integrity, match="--sign-key") as caught:
        load(home, digest, keys[0][1])
    assert caught.value.code == "signature-missing"


def test_a_key_that_cannot_be_used_is_said_before_the_import(home, keys, tmp_path):
    make_model(tmp_path / "other", megabytes=1)
    keys[0][0].chmod(0o644)
    done = CliRunner().invoke(weights, ["import", str(tmp_path / "other"), "--sign-key", str(keys[0][0])])
    assert done.exit_code == 1 and "key-too-open" in done.output and not (home / "store" / "manifests").exists()


@pytest.mark.parametrize("how", ["rm", "gc"])
def test_a_signature_goes_with_its_manifest(home, imported, how):
    chunks = ChunkStore(LocalStore(home / "store"))
    if how == "rm":
        remove(chunks, "m:v1")
    else:
        chunks.delete_ref("tags", "m:v1")
        collect(chunks, grace_s=0.0, untagged=True)
    assert chunks.signatures(imported) is None
    with pytest.raises(LazyfsError):
        chunks.get_manifest(imported)


def test_a_mount_that_is_there_already_is_no_way_round_the_keys(home, keys, imported, monkeypatch):
    """Whoever mounted it may have asked for no signature, or for another's."""
    there = client.MountHandle(1, home / "there", home / "socket", imported, f"file://{home}/store", home / "log")
    monkeypatch.setattr(client, "_ping_or_none", lambda _: there)
    (_, ours), (_, theirs) = keys
    assert client.mount(imported, home / "there") is there
    assert client.mount(imported, home / "there", trust_keys=(str(ours),)) is there
    with pytest.raises(Integrity, match="only .* is trusted"):
        client.mount(imported, home / "there", trust_keys=(str(theirs),))
