"""Which mirror, suite and packages `quickthaw setup criu` takes, from what apt says."""

from pathlib import Path

import pytest

from plugin.setup import apt
from plugin.setup.apt import DEBIAN, UBUNTU

pytestmark = pytest.mark.t0

HOST = "http://packages.example"
BOOKWORM = f"""\
bookworm	main	{HOST}/debian/
bookworm-updates	main	{HOST}/debian/
bookworm-security	main	{HOST}/debian-security/
"""
NOBLE = """\
noble	main	http://ppa.example/criu/ppa/ubuntu/
noble	main	https://vendor.example/cuda/repos/ubuntu2404/x86_64/
noble	main	http://archive.example/ubuntu/
noble	universe	http://archive.example/ubuntu/
noble-updates	main	http://archive.example/ubuntu/
noble-security	main	http://security.example/ubuntu/
"""


def found(targets, os_id):
    return [(source.mirror, source.suite) for source in apt.sources_in(targets, os_id)]


def test_a_debian_fetches_from_unstable_then_testing_of_its_own_mirror():
    assert found(BOOKWORM, "debian") == [
        (f"{HOST}/debian/", "sid"),
        (f"{HOST}/debian/", "testing"),
    ]


def test_an_ubuntu_fetches_from_its_newest_release_and_the_archive_comes_before_other_repositories():
    (first, *others) = found(NOBLE, "ubuntu")
    assert first == ("http://archive.example/ubuntu/", "devel")
    assert ("http://ppa.example/criu/ppa/ubuntu/", "devel") in others
    assert all("security.example" not in mirror for mirror, _ in [first, *others])
    source = apt.sources_in(NOBLE, "ubuntu")[0]
    assert source.line().endswith("http://archive.example/ubuntu/ devel main universe\n")


@pytest.mark.parametrize(
    ("mirror", "os_id", "distribution"),
    [
        (f"{HOST}/debian/", "ubuntu", DEBIAN),
        ("http://ports.example/ubuntu-ports/", "debian", UBUNTU),
        ("mirror+file:/etc/apt/mirrors.txt", "ubuntu", UBUNTU),
        ("mirror+file:/etc/apt/mirrors.txt", "debian", DEBIAN),
        ("https://debian.example/proxy/ubuntu-remote/", "debian", UBUNTU),
    ],
)
def test_the_distribution_of_a_mirror_is_in_its_path_else_it_is_the_hosts(mirror, os_id, distribution):
    assert apt.distribution_of(mirror, os_id) is distribution


def test_a_mirror_of_any_name_counts_if_it_serves_updates_too():
    targets = "noble\tmain\tmirror+file:/etc/apt/m.txt\nnoble-updates\tmain\tmirror+file:/etc/apt/m.txt\n"
    assert found(targets, "ubuntu") == [("mirror+file:/etc/apt/m.txt", "devel")]


@pytest.mark.parametrize(
    "targets",
    [
        "",
        "stable\tmain\thttps://vendor.example/apt/\n",
        f"bookworm-security\tmain\t{HOST}/debian-security/\n",
        "noble\tmultiverse\thttp://archive.example/ubuntu/\n",
        "garbled line without tabs\n",
    ],
)
def test_a_vendors_repository_is_no_source(targets):
    assert found(targets, "debian") == []


def test_a_source_names_its_keyring_and_no_message_its_password():
    source = apt.Source("https://user:secret@mirror.example/debian", DEBIAN, "sid", Path("/keys.gpg"))
    assert source.line() == "deb [signed-by=/keys.gpg] https://user:secret@mirror.example/debian sid main\n"
    assert str(source) == "debian sid from https://mirror.example/debian"
    assert "secret" not in apt.first_error([f"E: Failed to fetch {source.mirror}/x  404."])


@pytest.mark.parametrize(
    ("lines", "first"),
    [
        (["W: a warning", "E: Hash Sum mismatch.", "E: second"], "Hash Sum mismatch"),
        (["W: only a warning"], "only a warning"),
        ([], "apt failed without a message"),
    ],
)
def test_the_first_error_of_apt_is_the_message(lines, first):
    assert apt.first_error(lines) == first


def test_libraries_and_licences_are_fetched_and_nothing_else():
    depends = """\
criu
  Depends: libnet9
    libnet-older
 |Depends: iptables
libnet9
libc6
libc-gconv-modules-extra
libgcc-s1
gcc-16-base
libpython3.13
python3
<libgnutls>
libfoo-data
iptables
"""
    assert apt.wanted_packages(depends) == ["base-files", "criu", "gcc-16-base", "libc6", "libgcc-s1", "libnet9"]


@pytest.mark.parametrize(
    ("version", "enough"),
    [
        ("4.2-1ubuntu2", True),
        ("4.10~rc1-1", True),
        ("1:5.0-1", True),
        ("4.1-1", False),
        ("3.17.1-2+deb12u2", False),
        ("", False),
    ],
)
def test_a_version_of_debian_is_new_enough_or_not(version, enough):
    assert apt.new_enough(version) is enough
