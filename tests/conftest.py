"""What every test needs: assertions of the kits that show what they compared, and signals that are not ignored."""

import signal

import pytest

pytest.register_assert_rewrite("tests.kits")

# A shell ignores SIGINT for what it starts in the background, and nohup SIGHUP. The commands under test would inherit that.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)
