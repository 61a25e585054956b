"""Become the command that was given: for what quickthaw cannot serve, so that it starts as it would alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from typing import NoReturn

from checkpoint.sandbox import prestart
from checkpoint.snapshot import speculative
from launchers.base import without_own_variables
from launchers.errors import Usage


def run_as_given(words: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Replace this process by a command, with no helper process left. Raises Usage (not-executed)."""
    speculative.discard()
    prestart.end_unused()
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvpe(words[0], list(words), without_own_variables(environment))
    except OSError as error:
        raise Usage("not-executed", f"{words[0]}: {error.strerror}; check the command after launch") from error
