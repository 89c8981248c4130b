"""``completion``: scripts for shells, and what the shells ask back."""

from __future__ import annotations

import click

from vduse_blk.block.errors import UserError
from vduse_blk.cli import output
from vduse_blk.cli.options import json_option
from vduse_blk.control import rundir


def complete_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of disks that begin with ``incomplete``."""
    try:
        return [name for name in rundir.disk_names() if name.startswith(incomplete)]
    except (UserError, OSError):
        return []  # a shell that completes must not print errors into the line being typed


@click.command(short_help="Print a completion script for a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@json_option
def completion(shell: str, as_json: bool) -> None:
    """Print a script that makes SHELL complete commands, options and the names of disks.

    \b
    bash:  eval "$(vduse-blk completion bash)"           in ~/.bashrc
    zsh:   eval "$(vduse-blk completion zsh)"            in ~/.zshrc
    fish:  vduse-blk completion fish > ~/.config/fish/completions/vduse-blk.fish
    """
    from click.shell_completion import ShellComplete, get_completion_class

    from vduse_blk.cli import main

    kind = get_completion_class(shell)
    assert kind is not None
    # ShellComplete.source, not the subclass's: bash's runs bash to ask for its version.
    script = ShellComplete.source(kind(main.cli, {}, main.PROGRAM, main.COMPLETE_ENV))
    if as_json:
        output.print_json({"ok": True, "shell": shell, "script": script})
    else:
        click.echo(script)
