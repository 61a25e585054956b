"""Manifests are deterministic and named by their digest; hostile ones are refused."""

from __future__ import annotations

import blake3
import msgspec
import pytest

from lazyfs.content.manifest import Chunk, Directory, File, Manifest, Symlink, decode, encode
from lazyfs.errors import Integrity

pytestmark = pytest.mark.t0
D = "ab" * 32


def manifest(**changes):
    values = {
        "version": 1,
        "kind": "weights",
        "directories": (Directory("sub", 0o755),),
        "files": (File("a", 0o644, 3, (Chunk(D, 3),)), File("sub/b", 0o600, 0)),
        "symlinks": (Symlink("l", "a"),),
    }
    return Manifest(**{**values, **changes})


def test_round_trip_and_determinism():
    digest, data = encode(manifest())
    assert blake3.blake3(data).hexdigest() == digest
    assert decode(data, digest) == manifest()
    assert encode(decode(data, digest)) == (digest, data)
    assert manifest().size == 3 and manifest().chunk_digests() == {D}


def test_the_file_digest_depends_on_content_only():
    one, two = File("a", 0o644, 3, (Chunk(D, 3),)), File("other", 0o600, 3, (Chunk(D, 3),))
    assert one.digest == two.digest
    assert one.digest != File("a", 0o644, 4, (Chunk(D, 4),)).digest
    assert one.digest != File("a", 0o644, 3, (Chunk(D, 3),), "v2").digest
    assert one.offsets == (0, 3)


@pytest.mark.parametrize("position", [0, 40, -1])
def test_any_changed_byte_is_detected(position):
    digest, data = encode(manifest())
    spoiled = bytearray(data)
    spoiled[position] ^= 1
    with pytest.raises(Integrity):
        decode(bytes(spoiled), digest)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": (File("../x", 0o644, 0),)},
        {"files": (File("/x", 0o644, 0),)},
        {"files": (File("a//b", 0o644, 0),)},
        {"files": (File("a/./b", 0o644, 0),)},
        {"files": (File("nowhere/b", 0o644, 0),)},
        {"files": (File("", 0o644, 0),)},
        {"files": (File("a\0b", 0o644, 0),)},
        {"files": (File("a", 0o644, 0), File("a", 0o644, 0))},
        {"files": (File("a", 0o644, 5, (Chunk(D, 3),)),)},
        {"files": (File("a", 0o644, 0, (Chunk(D, 0),)),)},
        {"files": (File("a", 0o644, 0, (Chunk(D, 3), Chunk(D, -3))),)},
        {"files": (File("a", 0o644, 3, (Chunk("../../etc/passwd", 3),)),)},
        {"symlinks": (Symlink("sub", "x"),)},
    ],
)
def test_hostile_manifests_are_refused(changes):
    digest, data = encode(manifest(**changes))
    with pytest.raises(Integrity) as caught:
        decode(data, digest)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("body", [b"", b"null", b"{}", b"[]", b'{"version": 2}', b"\xff\xff"])
def test_malformed_documents_are_refused(body):
    with pytest.raises(Integrity):
        decode(body, blake3.blake3(body).hexdigest())


def test_unknown_fields_are_refused():
    _, data = encode(manifest())
    body = msgspec.json.encode({**msgspec.json.decode(data), "surprise": 1})
    with pytest.raises(Integrity):
        decode(body, blake3.blake3(body).hexdigest())
