"""The `rafs` command: global behaviour and the list of commands, each loaded when it is used."""

from __future__ import annotations

import gc
import importlib
import inspect
import os
import sys
from typing import Final

import click

from rafsfs import __version__
from rafsfs.config import load_config
from rafsfs.errors import UsageError
from rafsfs.siblings import check_siblings

from .run import report, say, single

COMMANDS: Final = {
    "bench": "Tell how fast models are read here, with the local disk beside.",
    "build": "Build a directory into an image and push it.",
    "cache": "See and manage the node's cache.",
    "cat": "Print a file of an image.",
    "check": "Check an image: structure, blobs, and with --data every byte.",
    "csi": "Run the driver that makes models Kubernetes volumes.",
    "daemon": "Run the node daemon of a cache directory.",
    "diff": "Show what changed between two images.",
    "doctor": "Tell what this machine can do, and what to do about the rest.",
    "export": "Write an image out as an ordinary directory.",
    "get": "Fetch a file of a web server, or files of an image, through the swarm.",
    "holder": "Keep what mounts need while the daemon's container is replaced.",
    "inspect": "Show what an image is made of.",
    "ls": "List files of an image.",
    "models": "Add and remove models of a pod's dynamic volume.",
    "mount": "Mount an image.",
    "preheat": "Have an image fetched by seeds or all nodes.",
    "prefetch": "Fetch files of a mount ahead of their reader.",
    "pull": "Fill the node's cache with an image.",
    "scheduler": "Run a scheduler for nodes that share what they fetch.",
    "status": "Show the daemon and its mounts.",
    "umount": "Take a mount away.",
    "wait": "Wait until a mount can be read or is complete.",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"cli.cmd_{cmd_name}").command
        _end_with_example(command)
        config = load_config()
        if config:
            from .settings import check_tables, option_defaults  # noqa: PLC0415 - only where there is a file

            check_tables(config, COMMANDS)
            ctx.default_map = {cmd_name: option_defaults(config, cmd_name, command)}
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


def _end_with_example(command: click.Command) -> None:
    """Move the example of a command's description to the end of its help, behind the options."""
    text, mark, example = inspect.cleandoc(command.help or "").partition("\n\nExample: ")
    if mark:
        command.help, command.epilog = text, f"Example: {example}"
    for child in command.commands.values() if isinstance(command, click.Group) else ():
        _end_with_example(child)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="rafs")
def main() -> None:
    """Lazy-loading, read-only filesystem for AI models on an OCI registry.

    REF is host[:port]/repository[:tag][@digest] or oci:DIR[:TAG].

    Example: rafs build model/ -t localhost:5000/model:v1 && rafs mount localhost:5000/model:v1 /models
    """


def run() -> None:
    """Run the command line of this process and exit."""
    # Imports make a hundred thousand objects that stay: looking through them for garbage takes a tenth of the start. `run_async`
    # turns it on.
    gc.disable()
    # numpy's linear algebra starts a thread per core on import, which spin for work that never comes.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a path may hold any bytes
    if "_RAFS_COMPLETE" in os.environ:  # a shell asks for completions
        main.main(prog_name="rafs")
    sys.exit(invoke(sys.argv[1:]))


def invoke(arguments: list[str]) -> int:
    """Run one command line; return its exit code. Never raises."""
    try:
        check_siblings()
        if arguments[:1] == ["daemon"]:
            from rafsfs.daemon import first_aid  # noqa: PLC0415

            first_aid.give(arguments)
        # Not `main.main`, which has an opinion of its own about a closed output.
        with main.make_context("rafs", arguments) as context:
            code = main.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.Abort:
        return report(KeyboardInterrupt())
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return UsageError.exit_code
    except click.ClickException as error:
        where = f" (see `{error.ctx.command_path} --help`)" if isinstance(error, click.UsageError) and error.ctx else ""
        say(error.format_message() + where)
        return UsageError.exit_code
    except BaseException as error:  # noqa: BLE001 - the boundary of the process: every error becomes a line and a code
        return report(single(error))
    return code if isinstance(code, int) else 0
