"""The options that launchers/options/known.py lists are those of the installed engines' parsers."""

import json
import os
import subprocess

import pytest

import launchers
from plugin.bench.presets import preset
from plugin.runtime.config import state_home

pytestmark = [pytest.mark.t2, pytest.mark.timeout(300)]
PARSERS = {
    "vllm": """
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
""",
    "sglang": """
import argparse
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
""",
}
PRINTS = """
import json
print()
print(json.dumps({name: action.nargs for action in parser._actions for name in action.option_strings}))
"""


@pytest.mark.parametrize("name", PARSERS)
def test_the_known_options_are_those_of_the_engine(name):
    installed = preset(name, state_home())
    done = subprocess.run(
        [str(installed.python), "-c", PARSERS[name] + PRINTS],
        env={**os.environ, **installed.environment, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    options = launchers.engine(name).options
    assert {option for option, count in found.items() if count == 0} == options.switches
    assert {option for option, count in found.items() if count in (None, 1)} == options.single - {"-O"}
    assert {option for option, count in found.items() if count in ("*", "+", "?")} == options.several
