"""A dumped workload that checks its own memory, and ways to restore it with a page server (see pages_workload)."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from checkpoint.criu.binary import Criu
from checkpoint.lazy_pages.client import PageServer, server_config
from checkpoint.sandbox.sandbox import TMP_DIR, Sandbox, SandboxConfig
from checkpoint.snapshot import speculative
from tests.kits.checkpoint.snapshots import LIMIT_S, sandbox_tmpdir, wait_for

HOME = Path(os.environ.get("QUICKTHAW_HOME", Path.home() / ".cache" / "quickthaw"))


class Frozen:
    """A dumped workload, and ways to restore it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        self.images.mkdir()
        self.criu = Criu.find(HOME)
        self.working_set = folder / "working-set.qws"
        self.deaths: list[str] = []
        self.warnings: list[str] = []
        self.count = itertools.count(1)
        script = folder / "frozen.sh"
        script.write_text("#!/bin/sh\nexit 0\n")
        script.chmod(0o755)
        with Sandbox() as sandbox:
            workload = str(Path(__file__).parents[2] / "programs" / "pages_workload.py")
            # Not the virtual environment's link: CRIU opens the path that is mapped.
            python = os.path.realpath(sys.executable)
            self.root = sandbox.start([python, "-I", "-S", workload, TMP_DIR], {}, "/")
            wait_for(sandbox_tmpdir(sandbox) / "ready")
            self.monotonic_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            self.criu.dump(sandbox, self.root, self.images, script, LIMIT_S)

    def sandbox(self) -> Sandbox:
        return Sandbox(SandboxConfig(monotonic_ns=self.monotonic_ns))

    def serve(
        self,
        record: bool = False,
        known: bool = True,
        rate: float = 800e6,
        images: Path | None = None,
        deaths: list[str] | None = None,
        pack: bool = True,
        fill: bool = False,
    ) -> tuple[PageServer, Path]:
        work = self.folder / f"work-{next(self.count)}"
        work.mkdir()
        known_set = self.working_set if known and not record else None
        config = server_config(images or self.images, known_set, record, rate, pack=pack, fill=fill)
        started = speculative.begin_pages(config, work)
        dead = (self.deaths if deaths is None else deaths).append
        return PageServer(*started, work / speculative.LAZY_PAGES_SOCKET, dead, self.warnings.append), work

    def restore(self, sandbox: Sandbox, work: Path, images: Path | None = None) -> None:
        self.criu.restore(sandbox, self.root, images or self.images, LIMIT_S, work, {}, lazy_pages=True)

    def restore_stopped(self, sandbox: Sandbox, work: Path) -> None:
        request = self.criu.restore_request(self.root, self.images, {}, lazy_pages=True)
        argv = [word.replace(speculative.WORK, str(work)) for word in request["argv"]]
        code = sandbox.execute(argv, request["env"], LIMIT_S, adopt=self.root)
        self.criu.check_restored(sandbox, code, work)

    @staticmethod
    def order(sandbox: Sandbox, **what: int) -> None:
        folder = sandbox_tmpdir(sandbox)
        (folder / "go.tmp").write_text(json.dumps(what))
        (folder / "go.tmp").rename(folder / "go")

    @staticmethod
    def result(sandbox: Sandbox) -> dict[str, Any]:
        path = sandbox_tmpdir(sandbox) / "result"
        found: dict[str, Any] = json.loads(wait_for(path))
        path.unlink()
        return found
