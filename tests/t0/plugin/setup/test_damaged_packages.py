"""A damaged or hostile package or wheel is refused in one line, and never waits or writes elsewhere."""

import io
import tarfile
import zipfile

import pytest

from checkpoint.errors import Integrity
from plugin.setup.criu import _unzip
from plugin.setup.debian_package import Unpacked

pytestmark = pytest.mark.t0
FILES = {"criu": b"wrapper", "criu.bin": bytes(range(256)) * 8, "lib/ld-linux-x86-64.so.2": b"loader" * 50}


@pytest.mark.slow
def test_a_byte_flipped_anywhere_in_a_wheel_is_no_traceback(tmp_path):
    wheel = tmp_path / "quickthaw_criu-4.2.1-py3-none-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in FILES.items():
            archive.writestr(f"quickthaw_criu/{name}", content)
    sound, refused = wheel.read_bytes(), 0
    for at in range(0, len(sound), 3):
        damaged = bytearray(sound)
        damaged[at] ^= 0xFF
        wheel.write_bytes(damaged)
        try:
            found = _unzip(wheel, tmp_path / str(at))
        except Integrity as error:
            assert error.code == "criu-package-damaged" and str(wheel) in str(error)
            refused += 1
        else:
            assert all(
                (found / name).read_bytes() == content for name, content in FILES.items() if (found / name).exists()
            )
    assert refused > len(sound) // 6


def ar(*members):
    """An ar archive; a member is its name, its size as text, its bytes."""
    return b"!<arch>\n" + b"".join(
        b"%-16s%-12s%-6s%-6s%-8s%-10s`\n" % (name, b"0", b"0", b"0", b"100644", size)
        + content
        + b"\n" * (len(content) % 2)
        for name, size, content in members
    )


def tar(*entries):
    """A tar file; an entry is its name, and its bytes or the name that a hard link refers to."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.LNKTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return made.getvalue()


@pytest.mark.parametrize("size", [b"-60", b"-1", b"1_0", b"", b"0x10"])
def test_a_size_that_is_no_number_is_refused_at_once(tmp_path, size):
    deb = tmp_path / "criu.deb"
    deb.write_bytes(ar((b"debian-binary", size, b"2.0\n")))
    with pytest.raises(Integrity, match="garbled"):
        Unpacked(tmp_path / "root").add(deb)


def test_links_in_the_control_archive_are_not_followed(tmp_path):
    control = tar(("./md5sums", "nowhere"), ("./control", b"Package: libfine\nVersion: 1\n"))
    data = tar(("./usr/lib/libfine.so.1", b"library"))
    deb = tmp_path / "libfine.deb"
    parts = [(b"debian-binary", b"2.0\n"), (b"control.tar", control), (b"data.tar", data)]
    deb.write_bytes(ar(*((name, b"%d" % len(content), content) for name, content in parts)))
    unpacked = Unpacked(tmp_path / "root")
    unpacked.add(deb)
    assert unpacked.packages == {"libfine": "1"}
    assert (unpacked.libraries / "libfine.so.1").read_bytes() == b"library"
