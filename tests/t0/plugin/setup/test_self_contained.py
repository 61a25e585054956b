"""Which CRIU a launch finds, and how it is started."""

import os
import sys

import pytest

from checkpoint.criu import self_contained
from checkpoint.criu.binary import Criu
from checkpoint.errors import Failed, HostLacks
from plugin.setup.criu import packages_in

pytestmark = pytest.mark.t0


def program(folder, self_contained_too=True):
    """A folder with files of the right names, and the program in it."""
    (folder / "lib").mkdir(parents=True)
    names = ["criu", "criu.bin", "lib/ld-linux-x86-64.so.2"] if self_contained_too else ["criu"]
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    return folder / "criu"


def test_a_self_contained_criu_is_started_by_its_own_loader(tmp_path):
    found = program(tmp_path / "own")
    folder = found.parent
    words = (folder / "lib" / "ld-linux-x86-64.so.2", "--library-path", folder / "lib", folder / "criu.bin")
    assert self_contained.command(found) == tuple(map(str, words))
    assert self_contained.binary(found) == folder / "criu.bin"
    (tmp_path / "linked").symlink_to(folder)
    assert self_contained.command(tmp_path / "linked" / "criu") == tuple(map(str, words))


def test_any_other_criu_is_started_as_it_is(tmp_path):
    found = program(tmp_path / "system", self_contained_too=False)
    assert self_contained.command(found) == (str(found),) and self_contained.binary(found) == found


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel's package on the path of modules."""
    package = tmp_path / "site" / "quickthaw_criu"
    program(package)
    (package / "__init__.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return package / "criu"


def test_the_program_of_the_wheel_is_found_without_importing_it(wheel):
    assert self_contained.from_wheel() == wheel
    assert "quickthaw_criu" not in sys.modules


def test_without_the_wheel_or_with_a_broken_one_there_is_no_program(wheel):
    wheel.unlink()
    assert self_contained.from_wheel() is None


def test_the_order_is_the_state_folders_the_wheels_the_one_on_the_path(wheel, tmp_path, monkeypatch):
    monkeypatch.delenv("QUICKTHAW_CRIU", raising=False)
    home, tried = tmp_path / "home", []

    def version(self, _):
        tried.append(self.program)
        if self.program not in works:
            raise HostLacks("criu-broken", "it does not start")
        return "4.2"

    monkeypatch.setattr(Criu, "cached_version", version)
    private = program(home / "criu")
    on_path = program(tmp_path / "bin", self_contained_too=False)
    monkeypatch.setenv("PATH", f"{on_path.parent}:{os.environ['PATH']}")
    works = {private, wheel, on_path}
    for best in (private, wheel, on_path):
        assert Criu.find(home).program == best
        works.discard(best)
    assert tried[-3:] == [private, wheel, on_path]
    with pytest.raises(HostLacks) as error:
        Criu.find(home)
    assert error.value.code == "criu-broken"


def test_without_any_the_remedy_is_the_command_that_installs_one(tmp_path, monkeypatch):
    monkeypatch.delenv("QUICKTHAW_CRIU", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostLacks, match=r"^criu-missing: .*; run quickthaw setup criu"):
        Criu.find(tmp_path)


def test_packages_are_those_named_and_those_of_named_folders(tmp_path):
    for name in ("b.deb", "a.deb", "other.txt"):
        (tmp_path / name).touch()
    assert packages_in([tmp_path]) == [tmp_path / "a.deb", tmp_path / "b.deb"]
    assert packages_in([tmp_path / "b.deb"]) == [tmp_path / "b.deb"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(Failed, match="criu-incomplete"):
        packages_in([tmp_path / "empty"])
