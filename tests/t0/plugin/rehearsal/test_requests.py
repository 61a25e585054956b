"""The requests of a rehearsal."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from plugin.rehearsal import requests

pytestmark = pytest.mark.t0


@pytest.mark.parametrize("error", [SystemExit(143), RuntimeError("can't start new thread")])
def test_a_batch_that_is_interrupted_while_it_gathers_ends_at_once(monkeypatch, error):
    """Its threads wait for all of them, up to ten minutes."""

    class Pool(ThreadPoolExecutor):
        begun = 0

        def submit(self, *words):
            self.begun += 1
            if self.begun == 3:
                raise error
            return super().submit(*words)

    monkeypatch.setattr(requests, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(requests, "PATIENCE_S", 20.0)
    began = time.monotonic()
    with pytest.raises(type(error)):
        requests._batch(None, None, None)
    assert time.monotonic() - began < 10
