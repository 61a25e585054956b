"""Only manifests that a trusted key has signed are accepted, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.errors import Failed, Integrity
from checkpoint.snapshot.signatures import FILE_NAME, check, check_folder, keygen, signer

pytestmark = pytest.mark.t0

MANIFEST = b'{"format": 1, "name": "s"}'


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("a", "b"):
        keygen(folder / name)
    return folder


def test_a_trusted_signature_passes_and_names_its_key(keys: Path, tmp_path: Path) -> None:
    name = keygen(tmp_path / "k", tmp_path / "public.pem")
    signature = signer(tmp_path / "k")(MANIFEST)
    assert check(MANIFEST, signature, [keys / "a.pub", tmp_path / "public.pem"]) == name


def test_any_of_several_signatures_and_keys_is_enough(keys: Path, tmp_path: Path) -> None:
    both = signer(keys / "a")(MANIFEST) + signer(keys / "b")(MANIFEST)
    bundle = tmp_path / "trusted.pem"
    bundle.write_bytes(b"# who may sign\n" + (keys / "a.pub").read_bytes() + b"\n" + (keys / "b.pub").read_bytes())
    assert check(MANIFEST, both, [keys / "b.pub"]) != check(MANIFEST, both, [keys / "a.pub"])
    assert check(MANIFEST, signer(keys / "b")(MANIFEST), [bundle])


@pytest.mark.parametrize("signature", [None, b"", b" \n"])
def test_a_missing_signature_is_refused(keys: Path, signature: bytes | None) -> None:
    with pytest.raises(Integrity) as caught:
        check(MANIFEST, signature, [keys / "a.pub"])
    assert caught.value.code == "signature-missing"


def test_a_signature_by_another_key_is_refused(keys: Path) -> None:
    with pytest.raises(Integrity, match="is signed by") as caught:
        check(MANIFEST, signer(keys / "b")(MANIFEST), [keys / "a.pub"])
    assert caught.value.code == "signature-wrong"


def test_another_key_with_the_trusted_keys_id_is_refused(keys: Path) -> None:
    forged = signer(keys / "b")(MANIFEST).split()
    forged[1] = signer(keys / "a")(MANIFEST).split()[1]
    with pytest.raises(Integrity) as caught:
        check(MANIFEST, b" ".join(forged), [keys / "a.pub"])
    assert caught.value.code == "signature-wrong"


@settings(deadline=None)
@given(place=st.integers(0, len(MANIFEST) * 8 - 1))
def test_a_flipped_bit_of_the_manifest_is_refused(keys: Path, place: int) -> None:
    changed = bytearray(MANIFEST)
    changed[place // 8] ^= 1 << place % 8
    with pytest.raises(Integrity, match="signature-wrong"):
        check(bytes(changed), signer(keys / "a")(MANIFEST), [keys / "a.pub"])


@settings(deadline=None)
@given(st.data())
def test_a_changed_character_of_the_signature_is_refused(keys: Path, data: st.DataObject) -> None:
    signature = bytearray(signer(keys / "a")(MANIFEST).rstrip())
    # Decoders ignore two bits of the last character before the padding.
    place = data.draw(st.integers(0, len(signature) - 4))
    new = data.draw(st.integers(33, 126).filter(lambda c: c != signature[place]))
    signature[place] = new
    with pytest.raises(Integrity, match="signature-wrong"):
        check(MANIFEST, bytes(signature), [keys / "a.pub"])


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_a_garbage_signature_is_refused(keys: Path, garbage: bytes) -> None:
    with pytest.raises(Integrity, match="signature-"):
        check(MANIFEST, garbage, [keys / "a.pub"])


def test_a_plain_signature_without_the_prefix_is_refused(keys: Path) -> None:
    key = serialization.load_pem_private_key((keys / "a").read_bytes(), None)
    assert isinstance(key, ed25519.Ed25519PrivateKey)
    words = signer(keys / "a")(MANIFEST).split()
    import base64

    words[2] = base64.b64encode(key.sign(MANIFEST))
    with pytest.raises(Integrity, match="signature-wrong"):
        check(MANIFEST, b" ".join(words), [keys / "a.pub"])


def test_a_folders_signature_is_checked(keys: Path, tmp_path: Path) -> None:
    with pytest.raises(Integrity, match="manifest-unreadable"):
        check_folder(tmp_path, [keys / "a.pub"])
    (tmp_path / "manifest.json").write_bytes(MANIFEST)
    with pytest.raises(Integrity, match="signature-missing"):
        check_folder(tmp_path, [keys / "a.pub"])
    (tmp_path / FILE_NAME).write_bytes(signer(keys / "a")(MANIFEST))
    assert check_folder(tmp_path, [keys / "a.pub"]) == MANIFEST
    (tmp_path / "manifest.json").write_bytes(MANIFEST + b" ")
    with pytest.raises(Integrity, match="signature-wrong"):
        check_folder(tmp_path, [keys / "a.pub"])


def test_keys_are_private_and_never_overwritten(tmp_path: Path) -> None:
    keygen(tmp_path / "k")
    assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600
    before = (tmp_path / "k").read_bytes()
    with pytest.raises(Failed, match="key-exists"):
        keygen(tmp_path / "k", tmp_path / "other.pub")
    assert (tmp_path / "k").read_bytes() == before
    assert not (tmp_path / "other.pub").exists()
    (tmp_path / "p").write_text("")
    with pytest.raises(Failed, match="key-exists"):
        keygen(tmp_path / "new", tmp_path / "p")
    assert not (tmp_path / "new").exists()
    with pytest.raises(Failed, match="key-not-written"):
        keygen(tmp_path / "no/such/folder")


def test_a_private_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    keygen(tmp_path / "k")
    (tmp_path / "k").chmod(0o640)
    with pytest.raises(Failed, match="key-too-open"):
        signer(tmp_path / "k")


def test_keys_of_another_kind_are_refused(tmp_path: Path) -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    (tmp_path / "k").write_bytes(
        other.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (tmp_path / "k").chmod(0o600)
    (tmp_path / "k.pub").write_bytes(
        other.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    with pytest.raises(Failed, match="key-wrong-kind"):
        signer(tmp_path / "k")
    with pytest.raises(Failed, match="key-wrong-kind"):
        check(MANIFEST, b"x", [tmp_path / "k.pub"])
    sealed = ed25519.Ed25519PrivateKey.generate().private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )
    (tmp_path / "k").write_bytes(sealed)
    with pytest.raises(Failed, match="key-wrong-kind"):
        signer(tmp_path / "k")


@pytest.mark.parametrize("content", [b"", b"nonsense", b"-----BEGIN PUBLIC KEY-----\nxx\n-----END PUBLIC KEY-----\n"])
def test_a_trust_file_without_a_key_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(Failed, match="key-wrong-kind"):
        check(MANIFEST, b"x", [tmp_path / "t"])


def test_missing_key_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"key-unreadable.*nothing"):
        signer(tmp_path / "nothing")
    with pytest.raises(Failed, match=r"key-unreadable.*nothing"):
        check(MANIFEST, b"x", [tmp_path / "nothing"])
