"""Signals that unwind a command, and steps that they do not interrupt."""

import os
import signal

import pytest

from plugin.runtime import signals

pytestmark = pytest.mark.t0


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    for number in before:  # a suite in a script's background ignores SIGINT, and one under nohup SIGHUP
        signal.signal(number, signal.SIG_DFL)
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_unwinds_and_so_does_a_second_one(handlers, number):
    signals.unwind()
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), number)
        assert ended.value.code == 128 + number


def test_an_ignored_signal_stays_ignored(handlers):
    """Of a command in the background of a script, or under nohup."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signals.unwind()
    os.kill(os.getpid(), signal.SIGINT)


def test_a_deferred_signal_arrives_at_the_end_of_the_block(handlers):
    signals.unwind()
    done = False
    with pytest.raises(SystemExit), signals.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        done = True
    assert done
