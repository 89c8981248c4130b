"""Entry point: which commands there are, and how every failure becomes one sentence and an exit code.

Each command lives in a module that is imported when the command runs: on a slow machine the import is most of
what a short command costs.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Final

import click

from vduse_blk import __version__
from vduse_blk.block.errors import UserError
from vduse_blk.cli import output
from vduse_blk.control.errors import ControlError, Exit

PROGRAM: Final = "vduse-blk"
COMPLETE_ENV: Final = "_VDUSE_BLK_COMPLETE"

COMMANDS: Final = {  # name → (module, attribute), in the order of --help
    "attach": ("attach", "attach"),
    "serve": ("attach", "serve"),
    "detach": ("detach", "detach"),
    "list": ("show", "list_disks"),
    "info": ("show", "info"),
    "resize": ("resize", "resize"),
    "upgrade": ("upgrade", "upgrade"),
    "set": ("settings", "set_values"),
    "doctor": ("doctor", "doctor"),
    "completion": ("completion", "completion"),
}


class LazyGroup(click.Group):
    """Imports a command's module when the command is looked up."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name]
        command = getattr(import_module(f"vduse_blk.cli.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name=PROGRAM)
def cli() -> None:
    """Give this host real disks (/dev/vdX) whose storage lives in user space.

    Exit status: 0 ok, 1 unexpected failure, 2 bad usage or input, 3 no such disk, 4 busy, 5 not permitted, 6
    this host cannot do it (see `vduse-blk doctor`), 7 timed out, 128+N interrupted by signal N.
    """


def main() -> None:
    """Run the command line and exit. With ``--json`` a failure is JSON on standard output, too."""
    _open_standard_files()
    as_json = output.wants_json(sys.argv[1:])
    if os.environ.get(COMPLETE_ENV, "").endswith("_complete") and not os.environ.get("COMP_CWORD", "").isdecimal():
        _fail(f"{COMPLETE_ENV} is for shells, which set COMP_WORDS and COMP_CWORD, too", Exit.USAGE, as_json)
    try:
        status = cli.main(prog_name=PROGRAM, complete_var=COMPLETE_ENV, standalone_mode=False)
    except click.UsageError as e:
        hint = f"; see `{e.ctx.command_path} --help`" if e.ctx is not None else ""
        _fail(" ".join(e.format_message().split()).rstrip(".") + hint, Exit.USAGE, as_json)
    except click.ClickException as e:
        _fail(e.format_message(), Exit.FAILED, as_json)
    except click.Abort:
        _fail("interrupted", output.INTERRUPTED, as_json)
    except UserError as e:
        _fail(str(e), e.exit_code, as_json, e.holders if isinstance(e, ControlError) else None)
    except BrokenPipeError:
        # The reader of our output went away (`vduse-blk list | head -1`). Nothing to say and nobody to say it
        # to; the interpreter must not try to flush what is left.
        sys.stdout = None
        sys.exit(Exit.FAILED)
    except OSError as e:
        _fail(_refusal(e), Exit.FAILED, as_json)
    except Exception as e:
        if as_json:
            output.print_json({"ok": False, "error": f"unexpected {type(e).__name__}: {e}", "code": int(Exit.FAILED)})
        raise  # a bug keeps its traceback; the interpreter exits with 1
    sys.exit(status if isinstance(status, int) else Exit.OK)


def _open_standard_files() -> None:
    """Where the caller closed one of descriptors 0, 1, 2, the next file opened would get its number, and a server its
    messages."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _refusal(error: OSError) -> str:
    """What the system refused, as a sentence without a traceback: a full disk is no bug."""
    import traceback

    reason = error.strerror or str(error) or type(error).__name__
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if frame.f_globals.get("__name__", "").partition(".")[0] in ("click", "rich"):  # all they do with files is print
        sys.stdout = None  # or the interpreter would try once more
        return f"cannot write to standard output: {reason}"
    return f"{error.filename}: {reason}" if error.filename else reason


def _fail(error: str, code: int, as_json: bool, holders: list[object] | None = None) -> None:
    output.fail(error, code, as_json, holders)
    sys.exit(int(code))
