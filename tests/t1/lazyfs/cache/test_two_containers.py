"""Two containers of one node and one volume: each in namespaces of its own for processes and mounts, as Pods with a hostPath.

Their locks are the kernel's, so one bound holds for both, what one pins the other one does not evict, and both fetch one model once.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from lazyfs.api import import_directory
from lazyfs.cache.cache import Cache
from lazyfs.cache.reservations import reserved_by_others
from tests.kits.lazyfs.rig import LIMIT_S, ROOT, write_model

pytestmark = [pytest.mark.t1, pytest.mark.slow, pytest.mark.skipif(os.geteuid() != 0, reason="needs namespaces")]
APART = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--uts", "--kill-child"]
MB = 1 << 20
BOUND = 38 * MB
"""Room for two models that are fetched at once, with what is reserved ahead, and not for all four."""


class Container:
    """A container that warms models one after the other, `rounds` times."""

    def __init__(self, names: list[str], rounds: int) -> None:
        command = (
            f'for i in $(seq {rounds}); do for name in {" ".join(names)}; do "$@" --json "$name" || exit 1; done; done'
        )
        quickthaw = [sys.executable, "-m", "plugin", "cache", "warm", "--cache-limit", str(BOUND / 1e9)]
        self.process = subprocess.Popen(
            [*APART, "sh", "-c", command, "sh", *quickthaw], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )  # fmt: skip

    def finish(self) -> list[dict[str, int]]:
        """Wait for its end; return what each warm said."""
        out, errors = self.process.communicate(timeout=3 * LIMIT_S)
        assert self.process.returncode == 0, errors
        return [json.loads(line)[0] for line in out.splitlines()]


@pytest.fixture
def models(home, tmp_path):
    """Names of four models of 11 MB in the node's store, whose originals are gone."""
    names = []
    for number in range(4):
        folder = write_model(tmp_path / f"m{number}", [6 * MB, 5 * MB], seed=40 + number)
        names.append(import_directory(folder)[:16])
        shutil.rmtree(folder)
    return names


def test_one_bound_holds_for_two_containers_that_fill_one_cache(home, models):
    root, most, ended = home / "cache", 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.01):
            if root.exists():
                most = max(most, Cache(root).usage())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        both = [Container(models[:2], 3), Container(models[2:], 3)]
        done = [container.finish() for container in both]
    finally:
        ended.set()
        watcher.join()
    assert most <= BOUND and reserved_by_others(root)[0] == 0
    assert most > 20 * MB, "they were there at the same time"
    for container in done:
        assert len(container) == 6 and all(one["fetched"] + one["present"] >= 11 * MB for one in container)
    assert sum(one["fetched"] for container in done for one in container) > 4 * 11 * MB, (
        "each evicts what is not in use"
    )


def test_two_containers_that_warm_one_model_leave_one_whole_copy(home, models):
    began = time.monotonic()
    done = [container.finish() for container in [Container(models[:1], 1) for _ in range(2)]]
    assert time.monotonic() - began < LIMIT_S
    fetched = sorted(one["fetched"] for (one,) in done)
    assert 11 * MB <= sum(fetched) <= 2 * 11.1 * MB and Cache(home / "cache").usage() < 12 * MB
    (again,) = Container(models[:1], 1).finish()
    assert again["fetched"] == 0 and again["present"] >= 11 * MB
    verified = subprocess.run(
        [sys.executable, "-m", "plugin", "weights", "verify", "--json"], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=True
    )  # fmt: skip
    assert json.loads(verified.stdout)["cache_bad"] == 0
