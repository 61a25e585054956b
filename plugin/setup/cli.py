"""`quickthaw setup`: install what quickthaw needs beside its own wheel."""

from __future__ import annotations

import os
from pathlib import Path

import click

from plugin.options import option, warn
from plugin.runtime.home import state_home


@click.group()
def setup() -> None:
    """Install what quickthaw needs beside its own wheel."""


@setup.command()
@option(
    "--from",
    "given",
    multiple=True,
    metavar="PATH",
    type=click.Path(exists=True, path_type=Path),
    help="Take it from here, without network: Debian packages (criu and its libraries), a folder of them, the wheel "
    "quickthaw_criu-….whl, or another host's folder criu. Repeatable.",
)
@option(
    "--mirror",
    metavar="URL",
    show_default="those of apt's configuration",
    help="The mirror of Debian or Ubuntu to fetch from.",
)
@option(
    "--keyring",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, resolve_path=True, path_type=Path),
    show_default="the distribution's",
    help="The keys that the mirror is signed with.",
)
@option("--force", is_flag=True, help="Install it even if a CRIU that works is there.")
def criu(given: tuple[Path, ...], mirror: str | None, keyring: Path | None, force: bool) -> None:
    """Install CRIU >= 4.2 in the state folder, with every library it needs, whatever this host has.

    Nothing else on this host changes, and root is not needed. A CRIU that works is left as it is. apt fetches the packages
    of Debian sid or Ubuntu's newest release, from a mirror that it uses already.

    \b
    quickthaw setup criu
    quickthaw setup criu --from quickthaw_criu-4.2.1-py3-none-linux_x86_64.whl
    """
    from plugin.setup.criu import install, kernel_check

    if given and mirror:
        raise click.UsageError("give --from or --mirror, not both")
    done = install(state_home(), lambda text: click.echo(text, err=True), given, mirror, keyring, force)
    found = done.criu
    where = f"installed in {found.program.parent}" if done.new else f"at {found.program}"
    click.echo(f"criu {found.version} {where} ({done.origin})")
    if done.new and (named := os.environ.get("QUICKTHAW_CRIU")):
        warn(f"QUICKTHAW_CRIU is set, so launches use {named} instead")
    why = kernel_check(found)
    click.echo(f"criu check: {why}; see quickthaw doctor" if why else "criu check: looks good")
