"""One vocabulary of options: every command's options have a variable, agree with each other, and are documented."""

import math
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from plugin.cli import ACTIONS, COMMANDS
from plugin.options import (
    PREFIX,
    WAKE_ON,
    Address,
    Duration,
    Limit,
    Option,
    consume_variables,
    replica,
    serving,
    settings_of,
    using,
)
from tests.kits.commands import command_named, options_of, walk

pytestmark = pytest.mark.t0
REPO = Path(__file__).resolve().parents[3]
EVERY = {option.name for option in using(*serving)(click.command()(lambda **_: None)).params}
REPLICAS = {option.name for option in using(*replica)(click.command()(lambda **_: None)).params}


def run(command, *arguments, env=None):
    """Return the parsed options of a command line and its output. Starts nothing."""
    seen = {}
    parsed = click.Command(command.name, params=command.params, callback=lambda **options: seen.update(options))
    parsed.context_settings = command.context_settings
    result = CliRunner().invoke(parsed, [str(word) for word in arguments], env=env)
    return result, seen


def test_every_option_of_every_command_reads_a_variable_and_shows_it():
    wrong = []
    for path, command in walk():
        shown = " ".join(command.get_help(click.Context(command)).split())
        for one in options_of(command):
            long = next(name for name in one.opts if name.startswith("--"))
            if one.hidden or long.removeprefix("--") in ACTIONS:
                continue
            name = one.envvar
            if not (
                isinstance(name, str) and name.startswith(PREFIX) and one.show_envvar and name in shown.replace(" ", "")
            ):
                wrong.append((*path, long, name))
            if not one.help:
                wrong.append((*path, long, "no help"))
    assert wrong == []


@pytest.mark.parametrize(
    ("names", "commands"),
    [(EVERY, ("launch", "restore", "proxy")), (REPLICAS, ("launch", "restore"))],
    ids=["serving", "replica"],
)
def test_commands_agree_on_the_options_that_they_share(names, commands):
    def said(one):
        kind = (one.type.name, getattr(one.type, "choices", None), getattr(one.type, "min", None))
        return (one.opts, one.secondary_opts, kind, one.default, one.multiple, one.help, one.envvar, one.old)

    found = [{one.name: said(one) for one in options_of(command_named(name)) if one.name in names} for name in commands]
    assert found[0].keys() == names and all(one == found[0] for one in found)


def test_an_option_means_the_same_in_every_command():
    meanings = {}
    for name in ("launch", "restore", "proxy"):
        for one in options_of(command_named(name)):
            meanings.setdefault(one.opts[0], set()).add((one.type.name, one.envvar))
    assert {name: kinds for name, kinds in meanings.items() if len(kinds) > 1} == {}


def test_the_document_lists_every_option_and_its_variable():
    page = (REPO / "docs" / "options.md").read_text()
    missing = []
    for name in ("launch", "restore", "proxy"):
        for one in options_of(command_named(name)):
            for word in (*one.opts, *one.secondary_opts, *one.old, one.envvar):
                if f"`{word}`" not in page and f"`{word} " not in page:
                    missing.append((name, word))
    assert missing == []


def test_the_file_accepts_the_commands_options():
    from plugin.proxy.endpoints.models_file import SETTINGS

    assert EVERY | {"listen", "root_path", "workers"} == SETTINGS


def test_a_single_path_in_the_file_needs_no_list(tmp_path):
    file = tmp_path / "models.yaml"
    file.write_text("models: {a: {command: x}}\ndeny: /metrics\nwake_on: [/v1, /x]\n")
    result, seen = run(command_named("proxy"), "--config", file)
    assert result.exit_code == 0, result.output
    assert seen["deny"] == ("/metrics",) and seen["wake_on"] == ("/v1", "/x")


@pytest.mark.parametrize("command", ["launch", "restore", "proxy"])
@pytest.mark.parametrize(
    ("given", "expected", "warnings"),
    [
        (["--token", "t"], ("t", "/-", None, 30.0), 1),
        (["--own-prefix", "/x", "--own-listen", "[::1]:9"], (None, "/x", ("::1", 9), 30.0), 2),
        (["--token", "old", "--admin-token", "new"], ("new", "/-", None, 30.0), 1),
        (["--drain", "2m"], (None, "/-", None, 120.0), 1),
        (["--admin-prefix", "/x", "--grace", "5"], (None, "/x", None, 5.0), 0),
    ],
)
def test_old_names_work_with_a_warning_that_names_the_new_one(command, given, expected, warnings):
    words = {"launch": ["vllm"], "restore": ["snap"], "proxy": []}[command]
    result, seen = run(command_named(command), *given, *words)
    assert result.exit_code == 0, result.output
    assert tuple(seen[name] for name in ("admin_token", "admin_prefix", "admin_listen", "grace")) == expected
    assert result.output.count("quickthaw: warning: --") == warnings
    assert (
        result.output.count(" is now --") == warnings
        and result.output.count("the next version drops the old name") == warnings
    )


@pytest.mark.parametrize(("old", "new", "value"), [("--shrink", "--trim", True), ("--no-shrink", "--no-trim", False)])
def test_a_former_switch_works_with_a_warning(old, new, value):
    result, seen = run(command_named("launch"), old, "vllm")
    assert result.exit_code == 0 and seen["trim"] is value
    assert f"warning: {old} is now {new}; the next version drops the old name" in result.output


@pytest.mark.parametrize(("old", "new"), [("full", "included"), ("thin", "excluded")])
def test_former_words_of_weights_work_with_a_warning(old, new):
    for given, env in ((["--weights", old], {}), ([], {"QUICKTHAW_WEIGHTS": old})):
        result, seen = run(command_named("launch"), *given, "vllm", env=env)
        assert result.exit_code == 0 and seen["weights"] == new
        assert f"--weights {old} is now --weights {new}; the next version drops the old name" in result.output
    result, seen = run(command_named("launch"), "--weights", new, "vllm")
    assert seen["weights"] == new and "warning" not in result.output


def test_old_names_are_not_in_the_help():
    for name in ("launch", "restore", "proxy"):
        command = command_named(name)
        words = set(re.findall(r"--[a-z-]+", command.get_help(click.Context(command))))
        assert not words & {old for one in options_of(command) for old in one.old}


@pytest.mark.parametrize(
    "given", [["--token", " "], ["--own-prefix", "x"], ["--own-listen", "nowhere"], ["--drain", "soon"]]
)
def test_an_old_name_takes_the_same_values(given):
    result, _ = run(command_named("proxy"), *given)
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("command", "words", "name", "value", "expected"),
    [
        ("launch", ["vllm"], "QUICKTHAW_NAME", "x", ("snapshot_name", "x")),
        ("launch", ["vllm"], "QUICKTHAW_RESTORES_AT_ONCE", "3", ("restore_concurrency", 3)),
        ("restore", ["s"], "QUICKTHAW_TRUST_KEYS", "/a:/b", ("trust_key", (Path("/a"), Path("/b")))),
        ("proxy", [], "QUICKTHAW_PROXY_IDLE_TIMEOUT", "10m", ("sleep_after", 600.0)),
        ("proxy", [], "QUICKTHAW_PROXY_DRAIN", "5", ("grace", 5.0)),
        ("proxy", [], "QUICKTHAW_TOKEN", "t", ("admin_token", "t")),
        ("launch", ["vllm"], "QUICKTHAW_SHRINK", "no", ("trim", False)),
    ],
)
def test_old_variables_work_with_a_warning(command, words, name, value, expected):
    result, seen = run(command_named(command), *words, env={name: value})
    assert result.exit_code == 0 and seen[expected[0]] == expected[1]
    assert f"quickthaw: warning: {name} is now QUICKTHAW_{expected[0].upper()};" in result.output
    new = f"QUICKTHAW_{expected[0].upper()}"
    assert "warning" not in run(command_named(command), *words, env={name: value, new: value})[0].output


def test_a_command_started_by_proxy_gets_none_of_its_variables():
    names = ("SLEEP_AFTER", "IDLE_TIMEOUT", "ADMIN_LISTEN", "OWN_LISTEN", "DRAIN", "PROXY_DRAIN", "PROXY_IDLE_TIMEOUT")
    inherited = {"QUICKTHAW_LOG_FORMAT": "json", "QUICKTHAW_API_KEY": "k", "PATH": "/bin"}
    environment = {f"QUICKTHAW_{name}": "x" for name in names} | inherited
    consume_variables(command_named("proxy"), environment)
    assert environment == inherited


def test_launch_ignores_proxys_old_variables():
    result, seen = run(command_named("launch"), "vllm", env={"QUICKTHAW_PROXY_IDLE_TIMEOUT": "10m"})
    assert seen["sleep_after"] == 0.0 and "warning" not in result.output


def test_a_kubernetes_service_variable_is_no_port():
    result, seen = run(command_named("restore"), "s", env={"QUICKTHAW_PORT": "tcp://10.0.0.1:8000"})
    assert result.exit_code == 0, result.output
    assert seen["port"] is None
    assert run(command_named("restore"), "s", env={"QUICKTHAW_PORT": "8001"})[1]["port"] == 8001


@pytest.mark.parametrize(
    ("text", "place"),
    [(":8000", ("0.0.0.0", 8000)), ("[::1]:9", ("::1", 9)), ("127.0.0.1:0", ("127.0.0.1", 0)), ("[::]:1", ("::", 1))],
)
def test_an_address_without_a_host_is_every_interface(text, place):
    assert Address().convert(text, None, None) == place


@pytest.mark.parametrize("text", ["8000", "host", ":", "h:99999", "h:-1", "h:²"])
def test_an_invalid_address_is_refused(text):
    with pytest.raises(click.BadParameter, match="HOST:PORT"):
        Address().convert(text, None, None)


@pytest.mark.parametrize(
    "option", ["--sleep-after", "--grace", "--hold-timeout", "--upstream-timeout", "--body-timeout", "--wake-timeout"]
)
def test_a_duration_takes_a_unit_and_a_plain_number_is_seconds(option):
    for text, value in (("90s", 90.0), ("10m", 600.0), ("1h", 3600.0), ("90", 90.0), ("0.5", 0.5)):
        result, seen = run(command_named("proxy"), option, text)
        assert result.exit_code == 0 and seen[option[2:].replace("-", "_")] == value, result.output


def test_a_number_of_the_file_is_read_as_on_the_command_line():
    assert Limit().convert(0.0, None, None) == Limit().convert(0, None, None) == math.inf
    assert Duration().convert(0.5, None, None) == 0.5
    for value in (math.nan, math.inf, -1.5, True):
        with pytest.raises(click.BadParameter):
            Duration().convert(value, None, None)


def test_a_duration_can_have_a_minimum():
    with pytest.raises(click.BadParameter, match="too short"):
        Duration(0.1).convert("0", None, None)


@pytest.mark.parametrize("path", ["/quickthaw-control", "/QUICKTHAW-control/", "/./quickthaw-control/x"])
def test_the_control_path_of_vllm_cannot_be_allowed(path):
    result, _ = run(command_named("launch"), "--allow", path, "vllm")
    assert result.exit_code == 2 and "controls the engine" in result.output


def test_wake_on_defaults_to_the_paths_that_engines_serve():
    _, options = run(command_named("launch"), "vllm")
    assert settings_of(options)["wake_on"] == frozenset(WAKE_ON)
    _, options = run(command_named("launch"), "--wake-on", "/a", "--wake-on", "/b*", "vllm")
    assert settings_of(options)["wake_on"] == {"/a", "/b*"}
    assert run(command_named("proxy"), env={"QUICKTHAW_WAKE_ON": "/a /b"})[1]["wake_on"] == ("/a", "/b")
    result, _ = run(command_named("proxy"), "--wake-on", "v1")
    assert result.exit_code == 2 and "names no path" in result.output
    page = (REPO / "docs" / "proxy.md").read_text()
    assert [path for path in WAKE_ON if f"`{path}`" not in page] == []


def test_every_serving_option_reaches_the_proxy():
    """Each is a setting of the proxy, or one that the commands themselves read."""
    from plugin.proxy.settings import Settings

    seen = set()

    class Seen(dict):
        def __getitem__(self, key):
            seen.add(key)
            return super().__getitem__(key)

    _, options = run(command_named("proxy"))
    Settings(**settings_of(Seen(options)))
    assert EVERY - seen == {"sleep_after", "standby_after", "log_level", "log_format", "quiet"}


def test_all_options_of_the_three_commands_support_old_names():
    assert all(
        isinstance(one, Option) for name in ("launch", "restore", "proxy") for one in options_of(command_named(name))
    )
    assert set(COMMANDS) >= {"launch", "restore", "proxy", "completion"}
