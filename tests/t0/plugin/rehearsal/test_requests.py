"""The requests of a rehearsal."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from checkpoint.snapshot.manifest import Canary
from launchers.errors import EngineFailed
from plugin.rehearsal import requests

pytestmark = pytest.mark.t0


class Engine:
    """Answers generations when it is allowed to, and counts them."""

    def __init__(self, refuses=0):
        self.prompts, self.refuses, self.may = [], refuses, threading.Event()

    def generate(self, client, prompt, tokens, timeout_s):
        self.prompts.append(prompt)
        self.may.wait(20)
        if len(self.prompts) <= self.refuses:
            raise EngineFailed("engine-refused", "no", status=429)
        return [1]


@pytest.fixture
def limited(monkeypatch):
    """Have the third request of a batch fail to begin with an error."""

    def limit(error):
        class Pool(ThreadPoolExecutor):
            begun = 0

            def submit(self, *words):
                self.begun += 1
                if self.begun == 3:
                    raise error
                return super().submit(*words)

        monkeypatch.setattr(requests, "ThreadPoolExecutor", Pool)

    return limit


def test_a_signal_that_interrupts_a_batch_waits_for_no_answer(limited):
    limited(SystemExit(143))
    engine, began = Engine(), time.monotonic()
    with pytest.raises(SystemExit):
        requests._batch(engine, None, Canary("", []))
    assert time.monotonic() - began < 10
    engine.may.set()


def test_where_threads_are_short_the_batch_is_a_smaller_one(limited):
    limited(RuntimeError("can't start new thread"))
    engine = Engine()
    engine.may.set()
    requests._batch(engine, None, Canary("", []))
    assert len(engine.prompts) == 2


def test_the_requests_of_a_batch_share_no_prefix_and_some_may_be_refused():
    engine = Engine(refuses=1)
    engine.may.set()
    requests._batch(engine, None, Canary("", []))
    assert len({prompt[:2] for prompt in engine.prompts}) == requests.BATCH
    engine = Engine(refuses=requests.BATCH)
    engine.may.set()
    with pytest.raises(EngineFailed):
        requests._batch(engine, None, Canary("", []))
