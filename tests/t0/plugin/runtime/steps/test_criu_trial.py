"""A trial that cannot be run counts as failed."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import NoReturn, cast

import pytest

from checkpoint.criu.binary import Criu
from plugin.runtime.steps import criu_trial

pytestmark = pytest.mark.t0


class Kernel:
    """The methods of Criu that the trial calls before it makes a sandbox."""

    def kernel_facts(self, home: Path) -> Path:
        return home / "facts"


def test_a_host_without_descriptors_takes_no_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sandbox(_: object) -> NoReturn:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(criu_trial, "Sandbox", sandbox)
    why = criu_trial.Trial(cast(Criu, Kernel()), tmp_path).wait()
    assert why is not None and why.startswith("host-io: a small process was not dumped and restored: Too many open")
    assert not (tmp_path / "run").exists()
