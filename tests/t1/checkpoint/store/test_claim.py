"""One launch makes each snapshot of a store: claims on a name, in a folder and in a bucket, and what a store that fails costs."""

import os
import threading
import time

import msgspec
import pytest

from checkpoint.store import claim
from checkpoint.store.claim import Claim
from lazyfs.stores import open_store

pytestmark = [pytest.mark.t1, pytest.mark.slow]
LIMIT_S = 20.0


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Claims whose times are a tenth and less."""
    for name, seconds in (("EXPIRES_S", 1.5), ("RENEW_S", 0.3), ("POLL_S", 0.05)):
        monkeypatch.setattr(claim, name, seconds)


@pytest.fixture
def url(shared_store):
    return shared_store


def wait(what):
    limit = time.monotonic() + LIMIT_S
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.02)


def claimed(url):
    return open_store(url).head("claims/snapshots/NAME") is not None


def test_of_many_at_once_one_makes_it_and_the_next_after_it_was_released(url):
    claims = [Claim(url, "NAME") for _ in range(6)]
    others = [one.holder(LIMIT_S) for one in claims]
    assert others.count("") == 1 and all(other == os.uname().nodename for other in others if other)
    (maker,) = [one for one, other in zip(claims, others, strict=True) if not other]
    made = threading.Event()
    maker.hold(made.is_set)
    time.sleep(2.0)  # longer than it lives unless it is renewed
    late = Claim(url, "NAME")
    assert late.holder(LIMIT_S) and claimed(url) and Claim(url, "OTHER").holder(LIMIT_S) == ""
    made.set()
    wait(lambda: not claimed(url))
    after = Claim(url, "NAME")
    assert after.holder(LIMIT_S) == "" and late.holder(0) and claims[0].holder(0) == others[0]
    after.release()
    wait(lambda: not claimed(url))


def test_a_claim_is_renewed_again_after_a_failure_of_the_store(monkeypatch, tmp_path):
    from lazyfs.errors import Temporary
    from lazyfs.stores.local import LocalStore

    url, put, failed = str(tmp_path / "store"), LocalStore.put, []

    def fail_first(store, *args, **more):
        if len(failed) < 2:
            failed.append(args)
            raise Temporary("it is away")
        return put(store, *args, **more)

    ours = Claim(url, "NAME")
    assert ours.holder(LIMIT_S) == ""
    ours.hold(lambda: False)
    monkeypatch.setattr(LocalStore, "put", fail_first)
    wait(lambda: len(failed) == 2)
    time.sleep(1.6)  # longer than it lives unless it is renewed
    assert Claim(url, "NAME").holder(LIMIT_S), "it is still held"
    ours.release()
    wait(lambda: not claimed(url))


def test_one_that_was_taken_over_while_the_store_was_away_is_not_taken_back(monkeypatch, tmp_path):
    from lazyfs.errors import Temporary
    from lazyfs.stores.local import LocalStore

    url, put, away = str(tmp_path / "store"), LocalStore.put, threading.Event()

    def fail_for_us(store, *args, **more):
        if not away.is_set():
            raise Temporary("it is away")
        return put(store, *args, **more)

    ours = Claim(url, "NAME")
    assert ours.holder(LIMIT_S) == ""
    monkeypatch.setattr(LocalStore, "put", fail_for_us)
    time.sleep(1.7)
    other = Claim(url, "NAME")
    assert other.holder(LIMIT_S) == "", "it had expired"
    away.set()
    for _ in range(20):
        found = msgspec.json.decode(bytes(open_store(url).get("claims/snapshots/NAME", limit=4096)))
        assert found["token"] == other._token
        time.sleep(0.05)
    ours.release()
    other.release()
    wait(lambda: not claimed(url))


def test_a_claim_whose_answer_was_lost_is_its_own(monkeypatch, tmp_path):
    from lazyfs.stores.local import LocalStore

    create = LocalStore.create
    monkeypatch.setattr(
        LocalStore, "create", lambda *given: create(*given) and create(*given)
    )  # as a client sends it again
    ours = Claim(str(tmp_path), "NAME")
    assert ours.holder(LIMIT_S) == "" and claimed(str(tmp_path))
    assert Claim(str(tmp_path), "NAME").holder(LIMIT_S) == os.uname().nodename
    ours.release()
    wait(lambda: not claimed(str(tmp_path)))


@pytest.mark.parametrize("found", ["of a launch that was killed", "damaged", "of a clock that runs ahead"])
def test_a_claim_that_is_not_renewed_is_taken_over_while_the_engine_loads(url, found):
    renewed = time.time() + (86400 if "ahead" in found else 0)
    document = msgspec.json.encode({"host": "gone", "token": "x", "renewed": renewed})
    open_store(url).put("claims/snapshots/NAME", b"\xff" if found == "damaged" else document)
    taken = Claim(url, "NAME")
    wait(lambda: taken._known.is_set() and not taken._other)
    assert taken.holder(0) == ""
    taken.release()
    wait(lambda: not claimed(url))


def test_the_name_of_another_host_is_shown_without_what_controls_a_terminal(tmp_path):
    document = msgspec.json.encode({"host": "\x1b[2J\nforged" + "x" * 1000, "token": "x", "renewed": time.time()})
    open_store(str(tmp_path)).put("claims/snapshots/NAME", document)
    other = Claim(str(tmp_path), "NAME").holder(LIMIT_S)
    assert other.startswith("\\x1b[2J\\nforged") and len(other) < 200


@pytest.mark.parametrize("store", ["http://127.0.0.1:1/store", "/proc/nowhere", "no-such-scheme://x"])
def test_a_store_that_fails_costs_nothing_but_a_second_maker(store, caplog):
    caplog.set_level("INFO", "quickthaw")
    failing = Claim(store, "NAME")
    assert failing.holder(LIMIT_S) == ""
    wait(lambda: "no claim in the store" in caplog.text)


def test_a_store_that_stalls_is_not_waited_for(monkeypatch, tmp_path):
    from lazyfs.stores.local import LocalStore

    go_on = threading.Event()
    monkeypatch.setattr(LocalStore, "create", lambda *_: go_on.wait(LIMIT_S) and False)
    stalled = Claim(str(tmp_path), "NAME")
    began = time.monotonic()
    assert stalled.holder(0.1) == "" and time.monotonic() - began < 5
    go_on.set()
