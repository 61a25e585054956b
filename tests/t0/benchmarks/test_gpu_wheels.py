"""Libraries keep the code of one architecture at its place; an archive of wheels unpacks to what was wanted."""

import struct
import tarfile
import zipfile

import pytest

from benchmarks.gpu_model import config, shapes
from benchmarks.gpu_prepare import ENGINES, wheel_of
from benchmarks.gpu_wheels import (
    ENTRY_HEADER,
    FATBIN_HEADER,
    FATBIN_MAGIC,
    MACHINE_CODE,
    NotElf,
    add_wheel,
    slim_library,
)

pytestmark = pytest.mark.t0
PTX = 1
BF16 = b"16CollectiveMainloopFwdSm90ILi2EN4cute5tupleIJNS5_1CILi1EEEEEELi128ENS_10bfloat16_tEfNS_4arch4Sm90E"
HALF = BF16.replace(b"10bfloat16_t", b"6half_t")
HEAD_64 = BF16.replace(b"Li128E", b"Li64E")


def entry(kind, architecture, code):
    return ENTRY_HEADER.pack(kind, 1, 64, len(code), 0, 0, 0, 0, architecture).ljust(64, b"\1") + code


def fat_binary(*entries):
    body = b"".join(entries)
    return FATBIN_HEADER.pack(FATBIN_MAGIC, 1, FATBIN_HEADER.size, len(body)) + body


def library(*fat_binaries):
    """Return an ELF file with one section of fat binaries, each 8 bytes after the one before."""
    code = (bytes(8)).join(fat_binaries)
    names = b"\0.nv_fatbin\0.shstrtab\0"
    table = 64 + len(code) + len(names)
    head = (
        b"\x7fELF\x02\x01\x01".ljust(0x28, b"\0") + struct.pack("<Q", table) + bytes(10) + struct.pack("<HHH", 64, 3, 2)
    )
    headers = [(0, 0, 0, 0, 0, 0), (1, 1, 0, 0, 64, len(code)), (12, 3, 0, 0, 64 + len(code), len(names))]
    sections = b"".join(struct.pack("<IIQQQQ", *header).ljust(64, b"\0") for header in headers)
    return head.ljust(64, b"\0") + code + names + sections


def test_only_one_architectures_machine_code_stays():
    old, own, newer, text = b"o" * 40, b"h" * 40, b"n" * 40, b"p" * 40
    data = library(
        fat_binary(entry(MACHINE_CODE, 80, old), entry(MACHINE_CODE, 90, own), entry(MACHINE_CODE, 100, newer)),
        fat_binary(entry(PTX, 90, text), entry(MACHINE_CODE, 80, old)),
    )
    slim = slim_library(data)
    assert slim == data.replace(old, bytes(40)).replace(newer, bytes(40)).replace(text, bytes(40))
    assert len(slim) == len(data) and slim.count(own) == 1


def test_of_flash_attention_one_head_size_and_format_stay():
    other = b"_Z19flash_combine_kernel"
    data = library(*(fat_binary(entry(MACHINE_CODE, 90, code)) for code in (BF16, HALF, HEAD_64, other)))
    slim = slim_library(data)
    assert BF16 in slim and other in slim and HALF not in slim and HEAD_64 not in slim


@pytest.mark.parametrize(
    "data", [b"", b"text", b"\x7fELF\x02" + bytes(100), library(fat_binary(entry(MACHINE_CODE, 90, b"x" * 64)))[:140]]
)
def test_what_is_no_whole_library_is_refused_or_untouched(data):
    try:
        assert slim_library(data) == data
    except NotElf:
        pass


def test_a_fat_binary_that_ends_outside_its_section_is_refused():
    whole = fat_binary(entry(MACHINE_CODE, 80, b"x" * 40))
    longer = FATBIN_HEADER.pack(FATBIN_MAGIC, 1, FATBIN_HEADER.size, 4096) + whole[FATBIN_HEADER.size :]
    with pytest.raises(NotElf, match="outside"):
        slim_library(library(longer))


def test_a_wheel_becomes_site_packages_without_what_is_left_out(tmp_path):
    wheel = tmp_path / "thing-1.0-py3-none-any.whl"
    data = library(fat_binary(entry(MACHINE_CODE, 80, b"o" * 40), entry(MACHINE_CODE, 90, b"h" * 40)))
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("thing/__init__.py", "text")
        file.writestr("thing/_C.so", data)
        file.writestr("thing/include/thing.h", "left out")
        file.writestr("thing-1.0.data/purelib/other.py", "laid beside")
    with tarfile.open(tmp_path / "site.tar", "w") as archive:
        add_wheel(archive, wheel, lambda name: "/include/" in name)
    with tarfile.open(tmp_path / "site.tar") as archive:
        archive.extractall(tmp_path / "site", filter="data")
    found = {str(file.relative_to(tmp_path / "site")) for file in (tmp_path / "site").rglob("*") if file.is_file()}
    assert found == {"thing/__init__.py", "thing/_C.so", "other.py"}
    assert (tmp_path / "site/thing/_C.so").read_bytes().count(b"h" * 40) == 1


def test_a_wheel_that_was_not_downloaded_is_named(tmp_path):
    (tmp_path / "sglang_kernel-0.4.5-cp310-abi3-linux_x86_64.whl").touch()
    assert wheel_of("sglang-kernel==0.4.5", tmp_path).name.startswith("sglang_kernel-0.4.5")
    with pytest.raises(LookupError, match=r"sglang-kernel==0\.4\.6"):
        wheel_of("sglang-kernel==0.4.6", tmp_path)
    with pytest.raises(LookupError, match="sglang==0"):
        wheel_of("sglang==0.4.5", tmp_path)


def test_what_an_engine_pins_is_pinned_once():
    for engine in ENGINES.values():
        names = [wheel.partition("==")[0] for wheel in engine.wheels]
        assert len(names) == len(set(names))


def test_the_model_has_seven_point_four_billion_parameters():
    count = sum(a * b for a, b in (shape if len(shape) == 2 else (shape[0], 1) for shape in shapes(32).values()))
    assert 7.3e9 < count < 7.45e9
    about = config(32)
    assert about["num_attention_heads"] * about["head_dim"] == about["hidden_size"]
