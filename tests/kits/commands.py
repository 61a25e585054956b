"""All click commands of quickthaw, for tests that apply to each of them."""

import click

from plugin.cli import cli


def walk(command=cli, path=()):
    """Yield every command without subcommands, with the words that run it."""
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            yield from walk(command.get_command(click.Context(command), name), (*path, name))
    else:
        yield path, command


def options_of(command):
    """Return the options of a command, without its arguments."""
    return [one for one in command.params if isinstance(one, click.Option)]


def command_named(name):
    """Return a command by its name, such as `launch`."""
    return cli.get_command(click.Context(cli), name)
