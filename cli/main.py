"""The `rafs` command: global behaviour and the list of commands, each loaded when it is used."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Any, Final

import click

import rafsfs
from rafsfs import __version__
from rafsfs.config import load_config
from rafsfs.errors import UsageError

from .run import report, single

_COMMANDS: Final = {
    "build": "Build a directory into an image and push it.",
    "cache": "See and manage the node's cache.",
    "cat": "Print a file of an image.",
    "check": "Check an image: structure, blobs, and with --data every byte.",
    "daemon": "Run the node daemon of a cache directory.",
    "doctor": "Tell what this machine can do, and what to do about the rest.",
    "export": "Write an image out as an ordinary directory.",
    "inspect": "Show what an image is made of.",
    "ls": "List files of an image.",
    "mount": "Mount an image.",
    "pull": "Fill the node's cache with an image.",
    "status": "Show the daemon and its mounts.",
    "umount": "Take a mount away.",
}
_SIBLINGS: Final = ("builder", "cli", "p2p", "scheduler")


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"cli.cmd_{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(_COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rafs")
def main() -> None:
    """Lazy-loading, read-only filesystem for AI models on an OCI registry.

    REF is host[:port]/repository[:tag][@digest] or oci:DIR[:TAG].

    Example: rafs build model/ -t localhost:5000/model:v1 && rafs mount localhost:5000/model:v1 /models
    """


def run() -> None:
    """Run the command line of this process and exit."""
    sys.exit(invoke(sys.argv[1:]))


def invoke(arguments: list[str]) -> int:
    """Run one command line; return its exit code. Never raises."""
    try:
        _check_siblings()
        code = main.main(arguments, prog_name="rafs", standalone_mode=False, default_map=_defaults())
        sys.stdout.flush()
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.Abort:
        return report(KeyboardInterrupt())
    except click.ClickException as error:
        where = f" (see `{error.ctx.command_path} --help`)" if isinstance(error, click.UsageError) and error.ctx else ""
        print(f"rafs: {' '.join(error.format_message().split())}{where}", file=sys.stderr)
        return UsageError.exit_code
    except BaseException as error:  # noqa: BLE001 - the boundary of the process: every error becomes a line and a code
        return report(single(error))
    return code if isinstance(code, int) else 0


def _defaults() -> dict[str, Any]:
    """Return option defaults from the config files. Raises UsageError for names that no command has."""
    config = load_config()
    for table, values in config.items():
        if table not in _COMMANDS:
            raise UsageError(f"config: no command {table!r}, expected one of {', '.join(sorted(_COMMANDS))}")
        command: click.Command = importlib.import_module(f"cli.cmd_{table}").command
        known = {parameter.name for parameter in command.params}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UsageError(f"config: [{table}] has no option {unknown[0]!r}")
    return config


def _check_siblings() -> None:
    """Raise UsageError if another `cli`, `builder`, ... shadows ours: their names are common."""
    home = os.path.dirname(os.path.dirname(os.path.abspath(rafsfs.__file__)))
    for name in _SIBLINGS:
        found = importlib.util.find_spec(name)
        origin = (
            os.path.dirname(os.path.dirname(os.path.abspath(found.origin))) if found and found.origin else "nowhere"
        )
        if origin != home:
            raise UsageError(
                f"package {name} comes from {origin}, not from beside rafsfs ({home}); run rafs from elsewhere"
            )
