"""Who makes a snapshot for a store: the claim of a start that fails is given up."""

from types import SimpleNamespace

import pytest

from plugin.runtime.steps import criu_trial, take_snapshot

pytestmark = pytest.mark.t0


class Claimed:
    def __init__(self):
        self.released, self.until = 0, None

    def release(self):
        self.released += 1

    def hold(self, until):
        self.until = until


@pytest.fixture
def claim(monkeypatch):
    claim = Claimed()
    monkeypatch.setattr(criu_trial, "Trial", lambda *_: None)
    monkeypatch.setattr(take_snapshot, "_claim", lambda _: claim)
    return claim


def replica():
    settings = SimpleNamespace(take_snapshot=True, home=None, push_to="s3://x/y")
    capabilities = SimpleNamespace(new_snapshots="")
    return SimpleNamespace(criu=object(), capabilities=capabilities, settings=settings, snapshot=None, library=None)


def test_a_start_that_fails_gives_its_claim_up_so_that_the_next_one_may_take_the_snapshot(claim):
    with pytest.raises(RuntimeError, match="the engine died"), take_snapshot.prepared(replica()):
        raise RuntimeError("the engine died")
    assert claim.released == 1 and claim.until is None


def test_a_claim_is_kept_for_a_snapshot_that_was_taken(claim):
    one = replica()
    with take_snapshot.prepared(one):
        one.snapshot = SimpleNamespace(name="NAME")
    assert claim.released == 0 and claim.until is not None
